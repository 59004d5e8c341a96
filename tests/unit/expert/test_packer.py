"""Packing experts while they serve: the same results, one layout in the end, and no unloaded expert kept alive."""

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from moecluster.expert import packer as packer_module
from moecluster.expert.packer import AT_ONCE_BYTES, JOIN_TIMEOUT_S, Packer
from moecluster.hf.shard import ExpertShard
from moecluster.moe.experts.glu import GluExpert
from moecluster.moe.linear import can_pack, plain
from tests.support.waiting import wait_until

WAIT_S = 60.0
LARGE = AT_ONCE_BYTES // (3 * 64 * 4) + 64  # inner width of an expert that is not packed at once


@pytest.fixture
def packer() -> Iterator[Packer]:
    found = Packer("test", always_at_once=False)
    yield found
    found.close()


def make_glu(inner: int, dtype: torch.dtype = torch.float32) -> GluExpert:
    return GluExpert(hidden_size=64, inner_size=inner, activation="silu").to(dtype).requires_grad_(False)


def make_shard(inner: int, dtype: torch.dtype = torch.float32) -> ExpertShard:
    rows = {"gate_up_proj": torch.randn(2 * inner, 64) * 0.1, "down_proj": torch.randn(64, inner) * 0.1}
    shard = ExpertShard(
        {name: row.to(dtype) for name, row in rows.items()},
        up_name="gate_up_proj",
        activate=lambda h_nF: h_nF[:, :inner] * h_nF[:, inner:],
    )
    return shard.requires_grad_(False)


def is_packed(module: nn.Module) -> bool:
    packed = {p.is_mkldnn for p in module.parameters()}
    assert len(packed) == 1
    return packed == {True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [make_glu, make_shard])
def test_a_large_expert_is_packed_while_it_computes(packer: Packer, make: type[nn.Module], dtype: torch.dtype) -> None:
    module = make(LARGE, dtype)
    before = {name: plain(value) for name, value in module.named_parameters()}
    packable = {can_pack(value) for value in module.parameters()}  # older CPUs have no packed form of bfloat16
    x_nD = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    answer = module(x_nD)
    packer.take(module)
    while not packer.wait(0.0):
        assert torch.allclose(module(x_nD), answer, rtol=1e-4, atol=1e-3)
    assert {is_packed(module)} == packable
    if dtype is torch.bfloat16:
        assert torch.equal(module(x_nD), answer)
    assert all(torch.equal(plain(value), before[name]) for name, value in module.named_parameters())
    assert not any(value.requires_grad for value in module.parameters())


def test_a_small_expert_is_packed_at_once(packer: Packer) -> None:
    module = make_glu(32)
    packer.take(module)
    assert is_packed(module)


def test_where_no_bit_may_change_all_are_packed_at_once() -> None:
    packer, module = Packer("test", always_at_once=True), make_glu(LARGE)
    packer.take(module)
    assert is_packed(module)
    packer.close()


def test_an_expert_that_was_unloaded_is_neither_packed_nor_kept(
    packer: Packer, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()
    packed: list[torch.Tensor] = []

    def slow_pack(value: torch.Tensor) -> nn.Parameter:
        began.set()
        assert go_on.wait(WAIT_S)
        packed.append(value)
        return nn.Parameter(value, requires_grad=False)

    monkeypatch.setattr(packer_module, "pack", slow_pack)
    first, second = make_glu(LARGE), make_glu(LARGE)
    packer.take(first)
    packer.take(second)
    assert began.wait(WAIT_S)
    gone = weakref.ref(second)
    del second
    gc.collect()
    assert gone() is None
    go_on.set()
    assert packer.wait(WAIT_S)
    assert len(packed) == 2  # the first one's


def test_closing_leaves_the_rest_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    packer = Packer("test", always_at_once=False)
    began, go_on = threading.Event(), threading.Event()

    def slow_pack(value: torch.Tensor) -> nn.Parameter:
        began.set()
        assert go_on.wait(WAIT_S)
        return nn.Parameter(value, requires_grad=False)

    monkeypatch.setattr(packer_module, "pack", slow_pack)
    modules = [make_glu(LARGE) for _ in range(3)]
    for module in modules:
        packer.take(module)
    assert began.wait(WAIT_S)
    threading.Timer(0.05, go_on.set).start()
    packer.close()
    assert not is_packed(modules[-1])
    packer.take(make_glu(LARGE))
    assert not any(thread.name == "pack-test" for thread in threading.enumerate())


def test_packing_waits_for_loads(packer: Packer) -> None:
    module = make_glu(LARGE)
    with packer.held(), packer.held():
        packer.take(module)
        assert not packer.wait(0.2)
        assert not is_packed(module)
    assert packer.wait(WAIT_S)
    assert is_packed(module)


def test_closing_amid_a_load_waits_for_nothing() -> None:
    packer = Packer("test", always_at_once=False)
    module = make_glu(LARGE)
    with packer.held():
        packer.take(module)
        packer.close()
    assert not is_packed(module)
    assert not any(thread.name == "pack-test" for thread in threading.enumerate())


def test_a_load_that_begins_amid_the_end_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    packer = Packer("test", always_at_once=False)
    began, go_on = threading.Event(), threading.Event()

    def slow_pack(value: torch.Tensor) -> nn.Parameter:
        began.set()
        assert go_on.wait(WAIT_S)
        return nn.Parameter(value, requires_grad=False)

    monkeypatch.setattr(packer_module, "pack", slow_pack)
    module = make_glu(LARGE)
    packer.take(module)
    assert began.wait(WAIT_S)
    closing = threading.Thread(target=packer.close)
    closing.start()
    wait_until(lambda: packer.closed, "the close")
    with packer.held():
        go_on.set()
        closing.join(JOIN_TIMEOUT_S / 2)
        assert not closing.is_alive()
