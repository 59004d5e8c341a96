"""What the texts of a batch are told of the exception that ended it, or one of them."""

import logging
from collections.abc import Mapping

from moecluster.errors import BatchBroken, MoeClusterError, RequestFailed
from moecluster.router.engine.expert_counts import ExpertCounts

logger = logging.getLogger(__name__)


def batch_error(error: Exception, num_texts: int) -> MoeClusterError:
    """For the texts that were computed when the error came; it is logged with its traceback.

    An error that is explained goes to all of them. Of one that is not, a single text is to blame; among several the one
    that is cannot be told.
    """
    logger.error("a batch of %d texts ended: %r", num_texts, error, exc_info=error)
    if isinstance(error, MoeClusterError):
        return error
    if num_texts == 1:
        return RequestFailed(f"the router cannot compute it: {error!r}")
    return BatchBroken(f"the batch that it was in failed: {error!r}")


def text_error(name: str, error: Exception, doing: str) -> MoeClusterError:
    """For the one text that something failed for; it is logged with its traceback. doing: what failed."""
    logger.error("text %s ends: %s failed: %r", name, doing, error, exc_info=error)
    return error if isinstance(error, MoeClusterError) else RequestFailed(f"{doing} failed: {error!r}")


def errors_of_texts(counts: ExpertCounts, num_rows: int, reasons: Mapping[int, str]) -> dict[str, MoeClusterError]:
    """What is wrong with the texts of these rows. Raises RequestFailed if it cannot be told whose rows they are.

    counts: knows the owners of the forward pass's rows, of which there are num_rows in the layer.
    """
    owners = counts.owners(reasons, num_rows)
    if not owners and num_rows != len(counts.owned_T):
        raise RequestFailed(next(iter(reasons.values())))
    for name, reason in {owners[row]: reason for row, reason in reasons.items() if row in owners}.items():
        logger.error("text %s ends: %s", name, reason)
    return {owners[row]: RequestFailed(reason) for row, reason in reasons.items() if row in owners}
