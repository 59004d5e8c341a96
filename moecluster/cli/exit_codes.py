"""The exit codes of all commands."""

from moecluster.errors import ClusterNotFound, MoeClusterError, UserError

DONE = 0
FAILED = 1
WRONG_USAGE = 2
NO_CLUSTER = 3
INTERRUPTED = 130  # by Ctrl-C; by another signal, 128 plus its number

HELP = (
    "Exit codes: 0 success; 1 failure; 2 wrong usage; 3 no cluster: the cluster that the command needs is not up; "
    "130 interrupted by Ctrl-C."
)

_CODES: tuple[tuple[type[MoeClusterError], int], ...] = (
    (ClusterNotFound, NO_CLUSTER),
    (UserError, WRONG_USAGE),
    (MoeClusterError, FAILED),
)


def exit_code(error: MoeClusterError) -> int:
    """Returns the exit code of a command that ended with this error."""
    return next(code for kind, code in _CODES if isinstance(error, kind))
