"""The errors of sequences whose batch, or own row, failed."""

import logging
from collections.abc import Mapping

from moecluster.errors import BatchBroken, MoeClusterError, RequestFailed
from moecluster.router.engine.expert_counts import ExpertCounts

logger = logging.getLogger(__name__)


def batch_error(error: Exception, num_sequences: int) -> MoeClusterError:
    """The error for the sequences in a failed batch; logs it with its traceback.

    A MoeClusterError goes to all of them. Any other error is the fault of a single sequence; among several, nothing
    says whose it is.
    """
    logger.error("a batch of %d sequences ended: %r", num_sequences, error, exc_info=error)
    if isinstance(error, MoeClusterError):
        return error
    if num_sequences == 1:
        return RequestFailed(f"the router cannot compute it: {error!r}")
    return BatchBroken(f"the batch that it was in failed: {error!r}")


def sequence_error(name: str, error: Exception, doing: str) -> MoeClusterError:
    """The error for one sequence; logs it with its traceback. doing: what failed."""
    logger.error("sequence %s ends: %s failed: %r", name, doing, error, exc_info=error)
    return error if isinstance(error, MoeClusterError) else RequestFailed(f"{doing} failed: {error!r}")


def errors_by_sequence(counts: ExpertCounts, num_rows: int, reasons: Mapping[int, str]) -> dict[str, MoeClusterError]:
    """Key of a sequence -> the error of its rows. Raises RequestFailed if the rows' owners are unknown.

    counts: knows the owners of the forward pass's rows, of which there are num_rows in the layer.
    """
    owners = counts.owners(reasons, num_rows)
    if not owners and num_rows != len(counts.owned_T):
        raise RequestFailed(next(iter(reasons.values())))
    for key, reason in {owners[row]: reason for row, reason in reasons.items() if row in owners}.items():
        logger.error("sequence %s ends: %s", key, reason)
    return {owners[row]: RequestFailed(reason) for row, reason in reasons.items() if row in owners}
