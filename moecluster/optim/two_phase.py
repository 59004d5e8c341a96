"""A two-phase optimizer: computes the new state beside the old one, then swaps it in or drops it.

It calls torch's own `torch.optim.adamw.adamw` and `torch.optim.sgd.sgd` in their single-tensor form (the default on
CPU), so that a step equals `torch.optim.AdamW` or `SGD` bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from moecluster.errors import CheckpointError
from moecluster.types import OptimizerSettings

Tensors = dict[str, torch.Tensor]


def state_names(settings: OptimizerSettings) -> tuple[str, ...]:
    """Returns the names of the optimizer's state per parameter. All start as zeros; `step` is a float32 scalar."""
    if settings.name == "adamw":
        return ("exp_avg", "exp_avg_sq", "step")
    return ("momentum_buffer",) if settings.momentum else ()


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: only to matrices. A fused bias has a matrix's shape, so the name is checked too."""
    return parameter.ndim >= 2 and not name.endswith("bias")


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    parameters: Tensors
    state: dict[str, Tensors]


class TwoPhaseOptimizer:
    """Steps named parameters. Keeps the same state per parameter as torch.optim, under the same names."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: OptimizerSettings,
        state: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """state: as returned by `state()`; None: fresh. Raises CheckpointError if it does not fit."""
        assert settings.name in ("adamw", "sgd"), f"optimizer {settings.name}"
        self._parameters = dict(parameters)
        self._settings = settings
        self._state: dict[str, Tensors] = {}
        self._prepared: _Prepared | None = None
        for key, value in (state or {}).items():
            self._put_state(key, value)

    def state(self) -> Tensors:
        """Returns `NAME/PARAMETER` -> tensor, for example `exp_avg/up_proj.weight`. Empty before the first step."""
        return {f"{kind}/{name}": value for name, kinds in self._state.items() for kind, value in sorted(kinds.items())}

    @torch.no_grad()
    def prepare(self, grads: Mapping[str, torch.Tensor], *, clip_scale: float, learning_rate: float) -> None:
        """Computes new parameters and state from gradients times clip_scale.

        A parameter without a gradient stays unchanged.
        """
        assert grads.keys() <= self._parameters.keys(), "gradients of unknown parameters"
        names = sorted(grads)
        parameters = {name: self._parameters[name].detach().clone() for name in names}
        state = {name: {k: v.clone() for k, v in self._state.get(name, {}).items()} for name in names}
        scaled = {name: grads[name] if clip_scale == 1.0 else grads[name] * clip_scale for name in names}
        for decayed in (True, False):
            group = [name for name in names if is_decayed(name, parameters[name]) is decayed]
            if group:
                weight_decay = self._settings.weight_decay if decayed else 0.0
                self._step(group, parameters, scaled, state, learning_rate, weight_decay)
        self._prepared = _Prepared(parameters=parameters, state=state)

    @torch.no_grad()
    def commit(self) -> None:
        """Swaps the prepared state in. Parameters keep their storage: modules and views see the new values."""
        assert self._prepared is not None, "commit without prepare"
        for name, value in self._prepared.parameters.items():
            self._parameters[name].copy_(value)
        self._state.update(self._prepared.state)
        self._prepared = None

    def abort(self) -> None:
        """Drops the prepared state, if there is any."""
        self._prepared = None

    def _step(
        self,
        names: list[str],
        parameters: Tensors,
        grads: Tensors,
        state: dict[str, Tensors],
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        """Runs the optimizer over names, in place on parameters and state."""
        settings = self._settings
        values, gradients = [parameters[n] for n in names], [grads[n] for n in names]
        if settings.name == "sgd":
            buffers = [state[n].get("momentum_buffer") for n in names]
            sgd(
                values,
                gradients,
                buffers,
                foreach=False,
                weight_decay=weight_decay,
                momentum=settings.momentum,
                lr=learning_rate,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
            for name, buffer in zip(names, buffers, strict=True):
                if buffer is not None:
                    state[name]["momentum_buffer"] = buffer
            return
        for name, value in zip(names, values, strict=True):
            if not state[name]:
                state[name]["exp_avg"] = torch.zeros_like(value, memory_format=torch.preserve_format)
                state[name]["exp_avg_sq"] = torch.zeros_like(value, memory_format=torch.preserve_format)
                state[name]["step"] = torch.zeros((), dtype=torch.float32)
        adamw(
            values,
            gradients,
            [state[n]["exp_avg"] for n in names],
            [state[n]["exp_avg_sq"] for n in names],
            [],
            [state[n]["step"] for n in names],
            foreach=False,
            amsgrad=False,
            beta1=settings.beta1,
            beta2=settings.beta2,
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=settings.eps,
            maximize=False,
        )

    def _put_state(self, key: str, value: torch.Tensor) -> None:
        kind, _, name = key.partition("/")
        parameter = self._parameters.get(name)
        if parameter is None or kind not in state_names(self._settings):
            raise CheckpointError(
                f"optimizer state {key} fits no parameter of this model under {self._settings.name}: "
                "resume with the optimizer and the model that the checkpoint was written with"
            )
        if kind != "step" and value.shape != parameter.shape:
            raise CheckpointError(
                f"optimizer state {key} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
            )
        # A step loaded from a file may not be 0-dimensional. No clone is needed: prepare() changes only copies.
        self._state.setdefault(name, {})[kind] = value.reshape(()) if kind == "step" else value.to(parameter.device)
