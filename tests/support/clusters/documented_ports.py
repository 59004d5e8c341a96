"""The table of ports in docs/security.md, and what really listens."""

import re
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from moecluster.addresses import PortRange, is_loopback

PAGE = Path(__file__).resolve().parents[3] / "docs" / "security.md"
HEADING = "## Ports"
HEAD = ("process", "what", "port", "protocol", "who may call")
NUMBERS = re.compile(r"(\d+)(?: to (\d+))?")


@dataclass(frozen=True, kw_only=True)
class DocumentedPort:
    """One row: a port of each process of this name."""

    process: str  # as process_name returns it
    what: str
    ports: PortRange | None  # None: any

    def explains(self, found: "OpenSocket") -> bool:
        """Whether a socket may be this one."""
        in_range = self.ports is None or self.ports.first <= found.port <= self.ports.last
        return found.is_tcp and found.process == self.process and in_range


@dataclass(frozen=True, kw_only=True)
class OpenSocket:
    """A socket that others can reach."""

    pid: int
    process: str
    host: str
    port: int
    is_tcp: bool


def documented_ports(page: Path = PAGE) -> list[DocumentedPort]:
    """Reads the table."""
    lines = iter(page.read_text().partition(f"{HEADING}\n")[2].partition("\n## ")[0].splitlines())
    head = next(_cells(line) for line in lines if line.startswith("|"))
    assert tuple(head) == HEAD, head
    next(lines)
    rows = [_cells(line) for line in lines if line.startswith("|")]
    assert all(len(row) == len(HEAD) and all(row) for row in rows), rows
    return [
        DocumentedPort(process=name, what=what, ports=_range(port))
        for processes, what, port, *_ in rows
        for name in re.findall(r"`([^`]+)`", processes)
    ]


def open_sockets(processes: Iterable[psutil.Process]) -> Iterator[OpenSocket]:
    """Yields the sockets that listen for connections or datagrams."""
    for process in processes:
        for found in process.net_connections(kind="inet"):
            is_tcp = found.type == socket.SOCK_STREAM
            if found.status == psutil.CONN_LISTEN or not (is_tcp or found.raddr):
                yield OpenSocket(
                    pid=process.pid,
                    process=process_name(process.cmdline()),
                    host=found.laddr.ip.removeprefix("::ffff:"),
                    port=found.laddr.port,
                    is_tcp=is_tcp,
                )


def process_name(words: list[str]) -> str:
    """Returns the name of a process: of a Python program its module, or its file and folder."""
    first = words[0].split()[0]
    if first.startswith("ray::"):
        return first.partition(".")[0]  # without the method that runs
    if not Path(first).name.startswith("python"):
        return Path(first).name
    if "-m" in words:
        return words[words.index("-m") + 1]
    script = next(Path(word) for word in words[1:] if not word.startswith("-"))
    return f"{script.parent.name}/{script.name}"


def unexplained(sockets: Iterable[OpenSocket], documented: Iterable[DocumentedPort]) -> list[OpenSocket]:
    """Returns the sockets that no row explains, more than the rows of their process, or beyond the loopback."""
    rows, found = list(documented), list(sockets)
    of_process = Counter(each.pid for each in found)
    return [
        each
        for each in found
        if not is_loopback(each.host)
        or not any(row.explains(each) for row in rows)
        or of_process[each.pid] > sum(row.process == each.process for row in rows)
    ]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _range(text: str) -> PortRange | None:
    found = NUMBERS.match(text)
    return None if found is None else PortRange(first=int(found[1]), last=int(found[2] or found[1]))
