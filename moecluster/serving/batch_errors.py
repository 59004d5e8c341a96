"""What the texts of a batch are told of the exception that ended it, or one of them."""

import logging

from moecluster.errors import BatchBroken, MoeClusterError, RequestFailed

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
