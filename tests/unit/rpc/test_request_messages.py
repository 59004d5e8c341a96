"""Load requests and placement notices: every field is transmitted, and wrong ones are refused by name."""

import dataclasses
from typing import Any

import pytest

from moecluster.errors import InvalidMessage
from moecluster.proto import expert_pb2, tensor_pb2
from moecluster.rpc.expert.request_messages import (
    decode_load_request,
    decode_placement_notice,
    encode_load_request,
    encode_placement_notice,
)
from moecluster.rpc.expert.requests import LoadRequest, PlacementNotice
from moecluster.types import ActorAddress, ExpertId, OptimizerSettings

LOAD = LoadRequest(
    term=3,
    experts=(ExpertId(layer=1, index=5), ExpertId(layer=0, index=2)),
    checkpoint="/models/one",
    dtype="bfloat16",
    weight_version=4,
    optimizer=OptimizerSettings(name="sgd", beta1=0.1, beta2=0.2, eps=1e-3, weight_decay=0.4, momentum=0.5),
    replace=True,
    training_term=6,
    timeout_s=7.5,
    peer=ActorAddress(actor="[fe80::1%eth0]:80", address="[fe80::1%eth0]:80", incarnation="a1"),
    max_bytes_per_s=8,
)
NOTICE = PlacementNotice(
    term=3, generation=9, checkpoint="/models/one", snapshot=b"\0\1", weight_version=2, weight_versions=(1, 2)
)


def differs_from_defaults(record: Any) -> bool:
    return all(getattr(record, field.name) != field.default for field in dataclasses.fields(record))


def test_a_load_comes_over_whole() -> None:
    assert differs_from_defaults(LOAD) and differs_from_defaults(LOAD.optimizer)
    assert decode_load_request(encode_load_request(LOAD)) == LOAD


def test_a_load_without_optimizer_and_peer_comes_over_without() -> None:
    plain = LoadRequest(term=1, experts=(), checkpoint="")
    assert decode_load_request(encode_load_request(plain)) == plain


def test_a_notice_comes_over_whole() -> None:
    assert differs_from_defaults(NOTICE)
    assert decode_placement_notice(encode_placement_notice(NOTICE)) == NOTICE


@pytest.mark.parametrize(
    ("field", "why", "changed"),
    [
        ("experts", "an expert is named twice", {"experts": [tensor_pb2.ExpertRef(layer=1)] * 2}),
        ("experts", "1/-2, a negative layer or index", {"experts": [tensor_pb2.ExpertRef(layer=1, index=-2)]}),
        ("timeout_s", "0.0, not within 0 and 3600", {"timeout_s": 0.0}),
        ("timeout_s", "nan, not within 0 and 3600", {"timeout_s": float("nan")}),
        ("peer_address", "'a b:80', expected host:port", {"peer_address": "a b:80"}),
        ("peer_address", "'a:0', expected host:port", {"peer_address": "a:0"}),
        ("peer_address", "'a:٣', expected host:port", {"peer_address": "a:٣"}),
        ("peer_address", f"'{'h' * 40}', expected host:port", {"peer_address": "h" * 300 + ":80"}),
        ("peer_incarnation", f"'{'x' * 40}', expected 1 to 256", {"peer_incarnation": "x" * 257}),
        ("peer_incarnation", "missing", {"peer_incarnation": ""}),
        ("peer_address", "missing, and there is a peer_incarnation", {"peer_address": ""}),
        ("optimizer.name", f"'{'x' * 40}' is none of adamw, sgd", {"optimizer": {"name": "x" * 300}}),
        ("optimizer", "beta1, beta2 and momentum lie in", {"optimizer": {"name": "sgd", "momentum": float("nan")}}),
    ],
)
def test_a_wrong_load_is_refused_by_name(field: str, why: str, changed: dict[str, Any]) -> None:
    message = encode_load_request(LOAD)
    for name in changed:
        message.ClearField(name)
    message.MergeFrom(expert_pb2.LoadRequest(**changed))
    with pytest.raises(InvalidMessage) as caught:
        decode_load_request(message)
    assert str(caught.value).startswith(f"{field}: {why}")
