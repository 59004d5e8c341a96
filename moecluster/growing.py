"""Growing numbers of which a receiver remembers the highest: terms, weight versions, steps, attempts.

A number far ahead of all others would lock out every other sender for good, so receivers refuse it.
"""

from moecluster.errors import InvalidMessage

MAX_AHEAD = 2**32  # of the highest known number
MAX_AHEAD_AT_START = 2**40  # when a training run starts: it goes above whatever its other participants have seen
MAX_NUMBER = 2**62  # of a number that a successor restarts and that is not compared with others


def check_ahead(number: int, known: int, field: str, *, most: int = MAX_AHEAD) -> None:
    """Raises InvalidMessage for a number that lies more than `most` above the highest known one."""
    if number > known + most:
        raise InvalidMessage(field, f"{number}, expected at most {most} above {known}, the highest known here")
