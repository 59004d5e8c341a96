"""Servers on other addresses than 127.0.0.1: IPv6, all addresses, several hosts' addresses on one machine."""

import socket
import urllib.request

import pytest

from moecluster.addresses import ListenAddress, PortRange, split_host_port
from moecluster.errors import ResourceError
from moecluster.metrics import Metrics
from moecluster.rpc.controller.client import controller_status
from moecluster.rpc.controller.server import serve_controller
from moecluster.rpc.metrics_server import MetricsServer
from tests.support.fakes.fake_controller import FakeController

HOST = "127.0.0.4"  # whose ports no other test takes


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("listen", "host"),
    [
        pytest.param(
            ListenAddress(host="::1"), "::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
        ),
        pytest.param(
            ListenAddress(host="::", advertised_host="::1"),
            "::1",
            marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine"),
        ),
        (ListenAddress(host="0.0.0.0", advertised_host="127.0.0.3"), "127.0.0.3"),
        (ListenAddress(host="127.0.0.2"), "127.0.0.2"),
    ],
    ids=["ipv6", "all ipv6", "all ipv4", "another host"],
)
def test_what_is_advertised_reaches_the_server(listen: ListenAddress, host: str) -> None:
    controller = FakeController()
    server = serve_controller(controller, credentials=None, listen=listen)
    metrics = MetricsServer(Metrics(model="m"), credentials=None, listen=listen)
    try:
        assert split_host_port(server.address)[0] == host
        assert controller_status(server.address).term == controller.status().term
        assert split_host_port(metrics.address)[0] == host
        with urllib.request.urlopen(f"http://{metrics.address}/metrics", timeout=5) as answer:
            assert b"moecluster_start_time_seconds" in answer.read()
    finally:
        metrics.close()
        server.stop(0.0)
        controller.close()


def test_two_hosts_have_the_same_port() -> None:
    controller = FakeController()
    first = serve_controller(controller, credentials=None, listen=ListenAddress(host="127.0.0.2"))
    port = split_host_port(first.address)[1]
    second = serve_controller(controller, credentials=None, listen=ListenAddress(host="127.0.0.3", port=port))
    try:
        assert (first.address, second.address) == (f"127.0.0.2:{port}", f"127.0.0.3:{port}")
        assert controller_status(second.address).term == controller_status(first.address).term
    finally:
        first.stop(0.0)
        second.stop(0.0)
        controller.close()


def free_ports(count: int) -> PortRange:
    """Returns a range of ports of 127.0.0.4 that are free now."""
    while True:
        with socket.create_server((HOST, 0)) as probe:
            first = int(probe.getsockname()[1])
        ports = PortRange(first=first, last=first + count - 1)
        try:
            for port in ports.shuffled():
                ListenAddress(host=HOST).probe(port)
            return ports
        except OSError:
            continue


def test_servers_share_a_range_of_ports_until_none_is_left() -> None:
    controller = FakeController()
    listen = ListenAddress(host=HOST, ports=free_ports(3))
    metrics = MetricsServer(Metrics(model="m"), credentials=None, listen=listen)
    servers = []
    try:
        servers = [serve_controller(controller, credentials=None, listen=listen) for _ in range(2)]
        addresses = [*(server.address for server in servers), metrics.address]
        taken = [split_host_port(address)[1] for address in addresses]
        assert listen.ports is not None and sorted(taken) == sorted(listen.ports.shuffled())
        exhausted = rf"cannot listen on 127\.0\.0\.4: no port of cluster\.port_range = {listen.ports} is free there"
        with pytest.raises(ResourceError, match=exhausted):
            serve_controller(controller, credentials=None, listen=listen)
        with pytest.raises(ResourceError, match=exhausted):
            MetricsServer(Metrics(model="m"), credentials=None, listen=listen)
        servers.pop().stop(0.0)
        servers.append(serve_controller(controller, credentials=None, listen=listen))
        assert controller_status(servers[-1].address).term == controller.status().term
    finally:
        metrics.close()
        for server in servers:
            server.stop(0.0)
        controller.close()


def test_a_fixed_port_in_use_names_its_setting() -> None:
    controller = FakeController()
    first = serve_controller(controller, credentials=None, listen=ListenAddress(host=HOST))
    listen = ListenAddress(host=HOST).at(split_host_port(first.address)[1], "cluster.controller_port")
    try:
        with pytest.raises(ResourceError, match=rf"{first.address}: the port is in use; choose another cluster\.contr"):
            serve_controller(controller, credentials=None, listen=listen)
    finally:
        first.stop(0.0)
        controller.close()
    again = serve_controller(controller, credentials=None, listen=listen)
    assert again.address == first.address
    again.stop(0.0)
