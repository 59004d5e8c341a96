"""Numbers that only grow, the highest of which a receiver remembers: terms, weight versions, steps, attempts.

One that is far ahead of all others would shut everybody else out for good, so no receiver takes it.
"""

from moecluster.errors import InvalidMessage

MAX_AHEAD = 2**32  # of the highest that is known
MAX_AHEAD_AT_START = 2**40  # of a run that begins: it goes above whatever others of its participants have seen
MAX_NUMBER = 2**62  # of one that a successor begins anew, and that is not compared with others


def check_ahead(number: int, known: int, field: str, *, most: int = MAX_AHEAD) -> None:
    """Raises InvalidMessage for a number that lies more than `most` above the highest known one."""
    if number > known + most:
        raise InvalidMessage(f"{field}: {number}, expected at most {most} above {known}, the highest known here")
