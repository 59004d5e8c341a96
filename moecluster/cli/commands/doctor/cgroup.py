"""Reads the limits of this process's control groups, version 1 or 2, its ancestors' included."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NO_LIMIT = 2**60  # version 1 writes a number near 2**63


@dataclass(frozen=True, kw_only=True)
class Cgroups:
    """The control groups of a process. A limit is None if there is none, or it cannot be read."""

    root: Path = Path("/sys/fs/cgroup")
    own: Path = Path("/proc/self/cgroup")

    def cpus(self) -> float | None:
        """Returns how many CPUs' time may be used."""
        found = []
        for folder, version in self._folders("cpu"):
            if version == 2:
                quota, _, period = _text(folder / "cpu.max").partition(" ")
            else:
                quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
            if quota.isdecimal() and period.isdecimal() and int(period):
                found.append(int(quota) / int(period))
        return min(found, default=None)

    def free_memory_bytes(self) -> int | None:
        """Returns how many bytes may still be taken, not counting file pages that can be dropped."""
        found = []
        for folder, version in self._folders("memory"):
            names = ("memory.max", "memory.current", "inactive_file")
            if version == 1:
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            limit, used = _number(folder / names[0]), _number(folder / names[1])
            if limit is not None and used is not None:
                droppable = _statistic(folder / "memory.stat", names[2])
                found.append(max(limit - max(used - droppable, 0), 0))
        return min(found, default=None)

    def free_tasks(self) -> int | None:
        """Returns how many more processes and threads may be started."""
        found = []
        for folder, _ in self._folders("pids"):
            limit, used = _number(folder / "pids.max"), _number(folder / "pids.current")
            if limit is not None and used is not None:
                found.append(max(limit - used, 0))
        return min(found, default=None)

    def _folders(self, controller: str) -> Iterator[tuple[Path, int]]:
        """Yields the group's folder, then its ancestors', each with its version."""
        for line in _text(self.own).splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if controller in controllers.split(","):
                base, version = self.root / controller, 1
            elif number == "0" and not controllers:
                base, version = self.root, 2
            else:
                continue
            group = base / path.lstrip("/")
            while group != base and base in group.parents:
                yield group, version
                group = group.parent
            yield base, version


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    """The number in a file; None for none, "max", or as good as no limit."""
    text = _text(file)
    return int(text) if text.isdecimal() and int(text) < NO_LIMIT else None


def _statistic(file: Path, name: str) -> int:
    """The number after a name in a file of such lines; 0 if there is none."""
    for line in _text(file).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            return int(value)
    return 0
