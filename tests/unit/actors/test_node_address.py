"""What a process of a node binds and advertises, by cluster.host, by the node's environment, and by Ray."""

import pytest

from actors.node_address import CONTROLLER_PORT, listen_address, refuse_host_of_one_node, resolve
from moecluster.config import read_config
from moecluster.config.sections import ClusterConfig
from moecluster.errors import ConfigError

NODE = "10.0.0.7"


@pytest.mark.parametrize(
    ("host", "environment", "bound", "advertised"),
    [
        ("", "", NODE, NODE),
        ("", "node-7.example.com", NODE, "node-7.example.com"),
        ("0.0.0.0", "", "0.0.0.0", NODE),
        ("::", "", "::", NODE),
        ("0.0.0.0", "203.0.113.7", "0.0.0.0", "203.0.113.7"),
        ("127.0.0.1", "", "127.0.0.1", "127.0.0.1"),
        ("10.9.9.9", "203.0.113.7", "10.9.9.9", "203.0.113.7"),
    ],
)
def test_bind_and_advertised_address(host: str, environment: str, bound: str, advertised: str) -> None:
    found = resolve(host, environment, lambda: NODE)
    assert (found.host, found.advertised(1)) == (bound, f"{advertised}:1")


@pytest.mark.parametrize("wrong", ["0.0.0.0", "::", "a:1", "[::1]", "a b"])
def test_an_environment_that_no_other_node_can_use_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"MOECLUSTER_ADVERTISED_HOST: got .*, by which other nodes reach this one"):
        resolve("", wrong, lambda: NODE)


def test_one_hosts_address_is_refused_on_several_nodes_only() -> None:
    several = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"]
    with pytest.raises(ConfigError) as refused:
        refuse_host_of_one_node(ClusterConfig(host="10.0.0.1"), several)
    assert str(refused.value).startswith(
        'cluster.host: got "10.0.0.1", which is one host\'s address, and Ray has nodes at 10.0.0.2, 10.0.0.3, 10.0.0.4 '
        "and 1 more; leave it empty"
    )
    for host in ("", "0.0.0.0", "::"):
        refuse_host_of_one_node(ClusterConfig(host=host), several)
    for host in ("10.0.0.1", "127.0.0.1", "localhost"):
        refuse_host_of_one_node(ClusterConfig(host=host), ["10.0.0.1"])
    refuse_host_of_one_node(ClusterConfig(host="127.0.0.1"), ["127.0.0.1", "127.0.0.1"])


@pytest.mark.parametrize("wrong", ["[::1]", "10.0.0.1:80", "http://a"])
def test_a_host_of_another_form_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.host: got .*, expected a host name, or an IPv4 or IPv6 address"):
        ClusterConfig(host=wrong)


def test_ports_that_settings_give_to_somebody_are_left_to_them() -> None:
    settings = {"host": "127.0.0.1", "port_range": "9000-9030", "controller_port": 9020, "num_expert_actors": 2}
    found = listen_address(read_config({"cluster": settings}))
    assert found.port == 0 and found.ports is not None and found.ports.reserved == {9020}
    with_metrics = listen_address(read_config({"cluster": {**settings, "metrics_port": 9001}}))
    assert with_metrics.ports is not None
    # Up to four routers, the controller, up to eight expert actors: as many as scaling allows.
    assert with_metrics.ports.reserved == {*range(9001, 9014), 9020}
    assert found.at(0, CONTROLLER_PORT) is found and found.at(9020, CONTROLLER_PORT).port == 9020


def test_a_port_of_the_controller_that_metrics_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="got 9001, expected one that no /metrics takes: 9000 to 9005"):
        ClusterConfig(metrics_port=9000, controller_port=9001)
    assert ClusterConfig(metrics_port=9000, controller_port=9006).controller_port == 9006
