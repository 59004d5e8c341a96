"""Names and ports of a cluster's actors."""

import re

import pytest

from actors.controller_config import controller_settings, router_limits
from actors.names import CONTROLLER, expert_names, is_router, metrics_port, metrics_ports, most_routers, router_names
from moecluster.config import Config, read_config
from moecluster.errors import ConfigError
from moecluster.placement.initial import initial_placement
from moecluster.placement.policy.interface import USUAL_BURST
from moecluster.rpc.controller.subscription import MAX_BACKOFF_S


def config(**cluster: int) -> Config:
    return read_config({"cluster": {"num_expert_actors": 2, **cluster}})


def test_the_first_router_has_the_plain_name() -> None:
    assert router_names(config()) == ("router",)
    assert router_names(config(num_routers=3)) == ("router", "router-1", "router-2")
    names = (*router_names(config(num_routers=2)), CONTROLLER, *expert_names(config()))
    assert [name for name in names if is_router(name)] == ["router", "router-1"]


def test_ports_follow_the_first_router_s_and_none_is_given_twice() -> None:
    assert metrics_ports(config(metrics_port=9000)) == {
        "router": 9000, "controller": 9001, "expert-0": 9002, "expert-1": 9003,
    }  # fmt: skip
    several = config(metrics_port=9000, num_routers=2)
    assert metrics_ports(several) == {
        "router": 9000, "router-1": 9001, "controller": 9002, "expert-0": 9003, "expert-1": 9004,
    }  # fmt: skip
    assert most_routers(several) == 8
    assert [metrics_port(several, f"router-{i}") for i in (2, 3, 7)] == [9005, 9006, 9010]
    assert [metrics_port(several, f"expert-{i}") for i in range(4)] == [9003, 9004, 9011, 9012]
    assert set(metrics_ports(config(num_routers=2)).values()) == {0}
    assert metrics_port(config(num_routers=2), "expert-5") == 0
    assert metrics_port(config(num_routers=2), "router-5") == 0


@pytest.mark.parametrize(
    ("serve", "limits"),
    [
        ({}, None),
        ({"min_routers": 1}, (1, 2)),
        ({"max_routers": 5}, (2, 5)),
        ({"min_routers": 1, "max_routers": 3}, (1, 3)),
    ],
)
def test_a_limit_that_is_not_given_is_the_number_at_the_start(serve, limits) -> None:
    found = router_limits(read_config({"cluster": {"num_routers": 2}, "serve": serve}))
    assert (None if found is None else (found.min_routers, found.max_routers)) == limits


def test_limits_that_exclude_the_number_at_the_start_are_refused() -> None:
    line = re.escape("cluster.num_routers: got 1, expected 2 to 3 (serve.min_routers, serve.max_routers)")
    with pytest.raises(ConfigError, match=line):
        router_limits(read_config({"serve": {"min_routers": 2, "max_routers": 3}}))


def test_plans_on_paper_borrow_as_much_as_a_cluster_does_by_default() -> None:
    assert read_config({}).controller.move_burst == USUAL_BURST


@pytest.mark.parametrize("lease_s", [0.1, 10.0])
def test_an_update_waits_longer_for_a_router_than_that_pauses_before_it_looks_for_a_controller(lease_s: float) -> None:
    settings = read_config({"cluster": {"num_expert_actors": 2}, "controller": {"lease_s": lease_s}})
    replicas = initial_placement("contiguous", {0: 4}, expert_names(settings))
    update = controller_settings(settings, "/model", replicas, {0: 4}).update
    assert update.router_grace_s >= MAX_BACKOFF_S + lease_s
