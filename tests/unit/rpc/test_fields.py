"""Addresses and expert ids in messages are encoded, decoded and checked the same way everywhere."""

import pytest

from moecluster.errors import InvalidMessage
from moecluster.proto import controller_pb2, router_pb2, tensor_pb2
from moecluster.rpc.controller.status_messages import decode_status
from moecluster.rpc.fields import (
    MAX_EXPERTS,
    checked_address,
    checked_optional_address,
    decode_experts,
    encode_experts,
)
from moecluster.rpc.router.messages import decode_router_status
from moecluster.types import ExpertId

WRONG = (
    "nowhere", ":80", "a:", "a:0", "a:65536", "a:000080", "a:-1", "a b:80", "a:٣", "unix:/a:1", "a:1\n", "a\0:1",
    "a" * 300 + ":1", "a:" + "9" * 5000,
)  # fmt: skip


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:65535", "[fe80::1%eth0]:80", "a-b.c_d:50051"])
def test_an_address_is_host_and_port(address: str) -> None:
    assert checked_address(address, "address") == checked_optional_address(address, "address") == address


@pytest.mark.parametrize("address", WRONG)
def test_anything_else_is_refused_by_name(address: str) -> None:
    with pytest.raises(InvalidMessage) as caught:
        checked_optional_address(address, "here")
    assert caught.value.field == "here" and caught.value.why.endswith(", expected host:port")
    assert len(str(caught.value)) < 200


def test_an_address_may_be_left_out_where_there_may_be_none() -> None:
    assert checked_optional_address("", "address") == ""
    with pytest.raises(InvalidMessage):
        checked_address("", "address")


def test_addresses_in_a_status_are_checked() -> None:
    actor = controller_pb2.ActorState(actor="expert-0", phase="serving", address="nowhere")
    with pytest.raises(InvalidMessage, match=r"^actors\.address: 'nowhere', expected host:port"):
        decode_status(controller_pb2.ControllerStatus(actors=[actor]))
    with pytest.raises(InvalidMessage, match=r"^controller: 'nowhere', expected host:port"):
        decode_router_status(router_pb2.RouterStatus(controller="nowhere"))


def test_experts_come_over_in_their_order() -> None:
    experts = (ExpertId(layer=3, index=1), ExpertId(layer=0, index=7))
    assert decode_experts(encode_experts(experts), "experts") == experts


@pytest.mark.parametrize(
    ("experts", "why"),
    [
        ([tensor_pb2.ExpertRef(layer=-1)], "-1/0, a negative layer or index"),
        ([tensor_pb2.ExpertRef(index=-1)], "0/-1, a negative layer or index"),
        ([tensor_pb2.ExpertRef(layer=2)] * 2, "an expert is named twice"),
        ([tensor_pb2.ExpertRef()] * (MAX_EXPERTS + 1), f"{MAX_EXPERTS + 1}, at most {MAX_EXPERTS}"),
    ],
    ids=["layer", "index", "twice", "many"],
)
def test_wrong_experts_are_refused_by_name(experts: list[tensor_pb2.ExpertRef], why: str) -> None:
    with pytest.raises(InvalidMessage) as caught:
        decode_experts(experts, "experts")
    assert (caught.value.field, caught.value.why) == ("experts", why)
