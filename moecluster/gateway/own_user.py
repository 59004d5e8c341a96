"""Whether the process at the other end of a loopback connection runs as the same user as this one.

The kernel lists every TCP socket of the host with its user in /proc/net. This keeps other users of the host out of a
gateway that was given no keys, without any set-up.
"""

import ipaddress
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from moecluster.addresses import is_loopback
from moecluster.gateway.api_errors import ApiError
from moecluster.rpc.shortage import is_shortage

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
OVERFLOW_USER = Path("/proc/sys/kernel/overflowuid")  # whom users of other namespaces appear as
MAPPED = b"\0" * 10 + b"\xff\xff"  # before an IPv4 address in an IPv6 socket

Address = tuple[str, int]


def is_own_user(client: Address | None, server: Address | None) -> bool:
    """Returns whether a connection from client to server, both numeric addresses, was opened by this process's user on
    this host. False if that cannot be told. Raises ApiError 503 if it cannot be told now."""
    if client is None or server is None:
        return False
    try:
        if not is_loopback(client[0]) or os.geteuid() == int(OVERFLOW_USER.read_text()):
            return False
        ends = {(near, far) for near, far in zip(_forms(client), _forms(server), strict=True)}
        return any(user == os.geteuid() for user in _users(ends))
    except OSError as exc:
        if is_shortage(exc):
            raise ApiError(503, f"the gateway cannot open files now ({exc.strerror}); try again later") from exc
        return False
    except ValueError:
        return False


def _forms(end: Address) -> list[str]:
    """Returns an end of a connection as the tables of IPv4 and of IPv6 sockets show it."""
    address = ipaddress.ip_address(end[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    packed = [address.packed, MAPPED + address.packed] if address.version == 4 else [b"", address.packed]
    return [f"{_shown(each)}:{end[1]:04X}" for each in packed]


def _shown(packed: bytes) -> str:
    """Returns an address as the kernel prints it: words of four bytes, in this machine's order."""
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(packed) // 4}I", packed))


def _users(ends: set[tuple[str, str]]) -> Iterator[int]:
    """Yields the users of the sockets with these (own, other) ends. A socket that its process has closed belongs to
    nobody, though the tables show user 0."""
    for table in TABLES:
        if not table.exists():
            continue  # no IPv6 on this host
        lines = table.read_text(encoding="ascii")
        for near, far in ends:
            if (at := lines.find(f" {near} {far} ")) >= 0:
                columns = lines[lines.rfind("\n", 0, at) + 1 : lines.find("\n", at)].split()
                if columns[9] != "0":
                    yield int(columns[7])
