"""Checks the loopback and the ports that the settings name."""

import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from actors.names import CONTROLLER, expert_names, fixed_ports, metrics_ports, router_names
from moecluster.addresses import PortRange
from moecluster.cli.commands.doctor.finding import Check, Finding, ok, problem, warning
from moecluster.config import Config

LOOPBACK = "127.0.0.1"
TIMEOUT_S = 5.0
GATEWAY = "serve.port"
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def loopback(config: Config) -> Finding:
    """Whether a process reaches another one on this host."""
    try:
        with closing(socket.create_server((LOOPBACK, 0))) as server:
            socket.create_connection(server.getsockname(), timeout=TIMEOUT_S).close()
    except OSError as exc:
        return problem(f"{LOOPBACK}: {exc.strerror or exc}", "bring the loopback up: ip link set lo up")
    return ok(f"{LOOPBACK} answers")


def ports(config: Config) -> Finding:
    """Whether the ports that the settings name are free."""
    wanted = list(_wanted(config))
    if short := _short_range(config):
        return problem(short, "widen cluster.port_range, or end what listens there")
    if not wanted:
        return ok("every server takes any free port")
    refused = {
        name: f"port {port} of {host} ({name}): {why}" for host, port, name in wanted if (why := _refusal(host, port))
    }
    if refused:
        # `up` starts no gateway: without its port, only `serve` and `gateway` are refused.
        report = warning if refused.keys() == {GATEWAY} else problem
        found = "; ".join(refused.values())
        return report(found, "end what listens there, or choose other ports (0: any free one)")
    numbers = ", ".join(str(port) for _, port, _ in wanted)
    low, high = _ephemeral()
    at_risk = [str(port) for _, port, _ in wanted if low <= port <= high]
    if at_risk:
        return warning(
            f"{', '.join(at_risk)} lie among the ports that outgoing connections take ({low} to {high})",
            f"choose ports below {low}, or reserve them: sysctl net.ipv4.ip_local_reserved_ports={','.join(at_risk)}",
        )
    return ok(f"{numbers} {'are' if len(wanted) > 1 else 'is'} free")


def _wanted(config: Config) -> Iterator[tuple[str, int, str]]:
    """Yields (address, port, for what) of every port that is fixed."""
    for actor, port in metrics_ports(config).items():
        if port:
            yield config.cluster.host or LOOPBACK, port, f"/metrics of {actor}"
    if config.cluster.controller_port:
        yield config.cluster.host or LOOPBACK, config.cluster.controller_port, "cluster.controller_port"
    if config.serve.port:
        yield config.serve.host, config.serve.port, GATEWAY


def _short_range(config: Config) -> str:
    """Returns why the ports of cluster.port_range are not enough for all actors on this host; empty if they are."""
    if not config.cluster.port_range:
        return ""
    ports = replace(PortRange.parse(config.cluster.port_range), reserved=fixed_ports(config))
    free = sum(not _refusal(config.cluster.host or LOOPBACK, port) for port in ports.shuffled())
    actors = len((*router_names(config), CONTROLLER, *expert_names(config)))
    # Each listens for gRPC and for /metrics, unless their ports are fixed.
    needed = actors * (1 if config.cluster.metrics_port else 2) - bool(config.cluster.controller_port)
    return f"{free} ports of {ports} are free, and {actors} actors take {needed}" if free < needed else ""


def _refusal(host: str, port: int) -> str:
    """Returns why one cannot listen there; empty if one can."""
    if port > 65535:
        return "there is no such port"
    try:
        (family, kind, number, _, address), *_ = socket.getaddrinfo(
            host or LOOPBACK, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, kind, number) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as exc:
        return exc.strerror or str(exc)
    return ""


def _ephemeral() -> tuple[int, int]:
    try:
        low, high = EPHEMERAL.read_text().split()
        return int(low), int(high)
    except (OSError, ValueError):
        return 32768, 60999  # the kernel's default


CHECKS = (Check(name="loopback", run=loopback), Check(name="ports", run=ports))
