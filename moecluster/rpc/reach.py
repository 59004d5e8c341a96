"""Proves that the processes of a cluster reach each other's servers, at the addresses that these tell others."""

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moecluster.addresses import split_host_port
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.server import open_channel

MAX_SHOWN = 4  # gaps in an error message
PROBE_TIMEOUT_S = 2.0  # of a bare connection, which tells why a call did not get through
MAX_PROBES = 32  # at once
SETTINGS = (
    "others reach a process by its node's address as Ray knows it, or by MOECLUSTER_ADVERTISED_HOST in the environment "
    "of the node's Ray; it listens there or on cluster.host; cluster.port_range and cluster.controller_port say which "
    "ports a firewall must let through"
)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A server that must be reached."""

    actor: str
    address: str  # host:port that it advertises
    server_id: str  # of its RunningServer
    node: str  # the address of its node, as Ray knows it


@dataclass(frozen=True, kw_only=True)
class Unreached:
    """A server that one process does not reach."""

    peer: Peer
    why: str


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Who does not reach whom."""

    source: str
    node: str  # of the source
    missing: Unreached

    def __str__(self) -> str:
        peer = self.missing.peer
        return (
            f"{self.source} on node {self.node} does not reach {peer.actor} at {peer.address} on node {peer.node}: "
            f"{self.missing.why}"
        )


def must_reach(
    *, routers: Sequence[Peer], experts: Sequence[Peer], controller: Peer, source: Peer | None
) -> dict[str, tuple[Peer, ...]]:
    """Returns, for each actor, the servers that it must reach. source: of the checkpoint; None if there is none."""
    sources = (source,) if source is not None else ()
    by_actor = {router.actor: (*experts, controller, *sources) for router in routers}
    by_actor |= {expert.actor: sources for expert in experts}
    by_actor[controller.actor] = (*experts, *sources)
    return {actor: peers for actor, peers in by_actor.items() if peers}


def unreached(
    peers: Sequence[Peer], *, credentials: ClusterCredentials | None, timeout_s: float
) -> tuple[Unreached, ...]:
    """Returns the peers that do not answer this process within the timeout. All are asked at once, with the cluster's
    credentials, for the very server that advertises the address."""
    with ExitStack() as stack:
        calls = []
        for peer in peers:
            stub: Any = health_pb2_grpc.HealthStub(stack.enter_context(open_channel(peer.address, credentials)))
            request = health_pb2.HealthCheckRequest(service=peer.server_id)
            calls.append(stub.Check.future(request, timeout=timeout_s, wait_for_ready=True))
        codes = [call.code() for call in calls]
    missing = [(peer, code) for peer, code in zip(peers, codes, strict=True) if code is not grpc.StatusCode.OK]
    if not missing:
        return ()

    def explain(peer: Peer, code: grpc.StatusCode) -> Unreached:
        return Unreached(peer=peer, why=_why(peer, code, timeout_s))

    with ThreadPoolExecutor(min(len(missing), MAX_PROBES), thread_name_prefix="probe") as pool:
        return tuple(pool.map(explain, *zip(*missing, strict=True)))


def complaint(gaps: Sequence[Gap]) -> str:
    """Returns one line for a user: who does not reach whom, and which settings matter."""
    shown = [str(gap) for gap in gaps[:MAX_SHOWN]]
    if len(gaps) > MAX_SHOWN:
        shown.append(f"and {len(gaps) - MAX_SHOWN} more")
    return f"the cluster's processes do not reach each other: {'; '.join(shown)}; {SETTINGS}"


def _why(peer: Peer, code: grpc.StatusCode, timeout_s: float) -> str:
    """Returns why a call failed: gRPC tells only that no connection came about in time."""
    if code is grpc.StatusCode.NOT_FOUND:
        return "another server answers there"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return "what listens there is no server of a cluster"
    try:
        socket.create_connection(split_host_port(peer.address), timeout=PROBE_TIMEOUT_S).close()
    except TimeoutError:
        return f"no answer within {timeout_s:g} s, as behind a firewall"
    except (OSError, ValueError) as exc:
        return str(getattr(exc, "strerror", None) or exc)
    return f"something listens there, but answers no call within {timeout_s:g} s ({code.name})"
