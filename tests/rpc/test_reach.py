"""A process finds out which servers it does not reach, and why."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from moecluster.addresses import ListenAddress, join_host_port
from moecluster.rpc.controller.server import serve_controller
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.reach import Peer, unreached
from moecluster.rpc.server import RunningServer
from tests.support.fakes.fake_controller import FakeController

CREDENTIALS = ClusterCredentials.make()
PATIENCE_S = 60.0
SHORT_S = 1.0  # for what never answers


def peer_of(server: RunningServer, address: str = "") -> Peer:
    return Peer(actor="expert-0", address=address or server.address, server_id=server.id, node="10.0.0.2")


@pytest.fixture
def servers() -> Iterator[list[RunningServer]]:
    """One on each of two hosts."""
    controller = FakeController()
    running = [
        serve_controller(controller, credentials=CREDENTIALS, listen=ListenAddress(host=host))
        for host in ("127.0.0.2", "127.0.0.3")
    ]
    yield running
    for server in running:
        server.stop(0.0)
    controller.close()


def why(peer: Peer, timeout_s: float) -> str:
    (missing,) = unreached([peer], credentials=CREDENTIALS, timeout_s=timeout_s)
    assert missing.peer == peer
    return missing.why


def test_servers_that_answer_are_reached(servers: list[RunningServer]) -> None:
    peers = [peer_of(server) for server in servers]
    assert unreached(peers, credentials=CREDENTIALS, timeout_s=PATIENCE_S) == ()
    assert unreached([], credentials=CREDENTIALS, timeout_s=PATIENCE_S) == ()


def test_only_what_is_away_is_named(servers: list[RunningServer]) -> None:
    servers[0].stop(0.0)
    first, second = map(peer_of, servers)
    (missing,) = unreached([first, second], credentials=CREDENTIALS, timeout_s=SHORT_S)
    assert missing.peer == first and missing.why == "Connection refused"


def test_the_address_of_another_server_is_no_reach(servers: list[RunningServer]) -> None:
    """Two hosts behind one address, each with a server on the same port of its own."""
    assert why(peer_of(servers[0], servers[1].address), PATIENCE_S) == "another server answers there"


def test_a_name_that_does_not_resolve(servers: list[RunningServer]) -> None:
    assert "not known" in why(peer_of(servers[0], "no-such-host.invalid:1"), SHORT_S)


def test_what_listens_and_answers_nothing(servers: list[RunningServer]) -> None:
    with socket.create_server(("127.0.0.2", 0)) as silent:
        said = why(peer_of(servers[0], join_host_port(*silent.getsockname())), SHORT_S)
    assert said == "something listens there, but answers no call within 1 s (DEADLINE_EXCEEDED)"


@contextmanager
def dropping() -> Iterator[str]:
    """Yields an address that answers no packet, as behind a firewall: its queue of connections is full."""
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.2", 0), backlog=0))
        with suppress(BlockingIOError, TimeoutError):
            while True:
                waiting = stack.enter_context(socket.socket())
                waiting.settimeout(0.5)
                waiting.connect(full.getsockname())
        yield join_host_port(*full.getsockname())


def test_what_a_firewall_drops(servers: list[RunningServer]) -> None:
    with dropping() as address:
        assert why(peer_of(servers[0], address), SHORT_S) == "no answer within 1 s, as behind a firewall"
