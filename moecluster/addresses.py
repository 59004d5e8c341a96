"""Addresses of servers: host and port in one string, and where a process listens against what it tells others."""

import errno
import ipaddress
import random
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Self, TypeVar

from moecluster.errors import ConfigError, ResourceError

WILDCARDS = ("0.0.0.0", "::")
MAX_PORT = 65535
HOST_FORM = "a host name, or an IPv4 or IPv6 address without brackets"
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,252})")
_RANGE = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")
_PORT = re.compile(r"[0-9]{1,5}")

ServerT = TypeVar("ServerT")


def is_host(text: str) -> bool:
    """Whether the text is HOST_FORM."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return _NAME.fullmatch(text) is not None
    return text.isprintable() and " " not in text  # behind % of an IPv6 address anything would do


def is_wildcard(host: str) -> bool:
    """Whether a server that listens on this host listens on all addresses of its machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether only processes of the same machine reach this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def join_host_port(host: str, port: int) -> str:
    """Returns host:port, with an IPv6 address in brackets, as gRPC and URLs take it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_host_port(address: str) -> tuple[str, int]:
    """Returns the host, without brackets, and the port. Raises ValueError unless it is as join_host_port makes it."""
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    is_port = _PORT.fullmatch(port) is not None and 0 < int(port) <= MAX_PORT
    if not (is_port and is_host(host) and bracketed == (":" in host)):
        raise ValueError(f'"{address[:80]}", expected HOST:PORT, an IPv6 address in brackets')
    return host, int(port)


@dataclass(frozen=True, kw_only=True)
class PortRange:
    """The ports that servers may take, both ends included."""

    first: int
    last: int
    reserved: frozenset[int] = frozenset()  # ports within the range that settings give to somebody

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads FIRST-LAST. Raises ValueError."""
        found = _RANGE.fullmatch(text)
        if found is None or not 0 < int(found[1]) <= int(found[2]) <= MAX_PORT:
            raise ValueError(f'"{text[:80]}", expected FIRST-LAST within 1 and {MAX_PORT}, such as 20000-20999')
        return cls(first=int(found[1]), last=int(found[2]))

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    def shuffled(self) -> list[int]:
        """Returns the ports that are not reserved. In random order: a port that a server has just left would get
        calls meant for that one."""
        ports = [port for port in range(self.first, self.last + 1) if port not in self.reserved]
        random.shuffle(ports)
        return ports


@dataclass(frozen=True, kw_only=True)
class ListenAddress:
    """Where a server listens, and what it tells others."""

    host: str = "127.0.0.1"  # 0.0.0.0 or :: for all addresses of the machine
    advertised_host: str = ""  # by which others reach it; empty: host
    port: int = 0  # 0: a free one of ports
    ports: PortRange | None = None  # None: any
    port_setting: str = "port"  # the name of the setting of port, for error messages

    def __post_init__(self) -> None:
        if is_wildcard(self.advertised_host or self.host):
            raise ConfigError(f"{self.advertised_host or self.host} is no address by which others reach a server")

    @property
    def family(self) -> socket.AddressFamily:
        """The family of the host's address."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    def advertised(self, port: int) -> str:
        """Returns host:port for others."""
        return join_host_port(self.advertised_host or self.host, port)

    def at(self, port: int, setting: str) -> "ListenAddress":
        """Returns this address with a port that a setting gives; 0: as before."""
        return replace(self, port=port, port_setting=setting) if port else self

    def bind(self, listen: Callable[[int], ServerT]) -> ServerT:
        """Returns what `listen` makes of a port; it raises OSError if the port is taken. Raises ResourceError if no
        port is free, or the machine does not have the address."""
        _refuse_foreign(self.host)
        if self.port or self.ports is None:
            try:
                self.probe(self.port)
                return listen(self.port)
            except OSError as exc:
                target = join_host_port(self.host, self.port)
                why = (exc.strerror or str(exc)) if exc.errno == errno.EACCES else "the port is in use"
                raise ResourceError(f"cannot listen on {target}: {why}; choose another {self.port_setting}") from exc
        for port in self.ports.shuffled():
            with suppress(OSError):
                self.probe(port)
                return listen(port)
        raise ResourceError(
            f"cannot listen on {self.host}: no port of cluster.port_range = {self.ports} is free there; widen it"
        )

    def probe(self, port: int) -> None:
        """Raises OSError if the port is in use. Unlike a server that tries, it logs nothing."""
        socket.create_server((self.host, port), family=self.family).close()


def _refuse_foreign(host: str) -> None:
    """Raises ResourceError if this machine does not have the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError as exc:
        raise ResourceError(
            f"cannot listen on {host}: it is no address of this machine ({exc.strerror or exc}); leave cluster.host "
            "empty for the address of each node, or take 0.0.0.0 (or ::) for all addresses"
        ) from exc
