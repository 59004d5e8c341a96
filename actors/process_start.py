"""When a process started, in a form that setting the clock does not change: its pid may be reused."""

from pathlib import Path

STARTTIME = 19  # field 22 of /proc/PID/stat (proc_pid_stat(5)), counted from the state, which follows the name


def start_ticks(pid: int) -> int | None:
    """Returns the clock ticks from the boot of the machine to the start of the process; None if it is gone."""
    try:
        found = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(found.rpartition(")")[2].split()[STARTTIME])  # the name may hold spaces and parentheses
