"""Encodes and decodes the messages of a training run in a router's process, with checks of what is received."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moecluster.errors import InvalidMessage, MoeClusterError, StateLost, UserError
from moecluster.proto import router_pb2
from moecluster.rpc.fields import checked_name, checked_path
from moecluster.strict_json import JsonProblem, parse_json

MAX_SETTINGS_CHARACTERS = 2**20
MAX_EVENTS = 1000  # in one message
_KINDS: tuple[tuple[str, type[MoeClusterError]], ...] = (
    ("user", UserError), ("state-lost", StateLost), ("other", MoeClusterError),
)  # fmt: skip


class RunGone(StateLost):
    """The run ended with its process; a new run may continue from the last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class StartRequest:
    """A training run to begin."""

    run_id: str  # chosen by the caller: repeating it starts nothing new
    settings: Mapping[str, Any]  # by section; paths as the router's node sees them
    start: str = ""  # the checkpoint to begin from; empty: the last one of train.output_dir, or a fresh model


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """New events of a run, and whether these are its last."""

    events: tuple[str, ...]  # each an object in JSON
    ended: bool
    error: MoeClusterError | None = None  # why the run failed, if it did


def encode_start(request: StartRequest) -> router_pb2.StartTrainingRequest:
    """Returns the message of a run to begin."""
    return router_pb2.StartTrainingRequest(
        run_id=request.run_id, settings_json=json.dumps(request.settings), start=request.start
    )


def decode_start(message: router_pb2.StartTrainingRequest) -> StartRequest:
    """Returns the run to begin of a message; its settings are not checked yet. Raises InvalidMessage."""
    if len(message.settings_json) > MAX_SETTINGS_CHARACTERS:
        raise InvalidMessage("settings_json", f"{len(message.settings_json)} characters, at most {2**20}")
    try:
        settings = parse_json(message.settings_json.encode())
    except JsonProblem as exc:
        raise InvalidMessage("settings_json", str(exc)) from exc
    if not isinstance(settings, dict):
        raise InvalidMessage("settings_json", "no object, expected a table by section")
    return StartRequest(
        run_id=checked_name(message.run_id, "run_id"),
        settings=settings,
        start=checked_path(message.start, "start") if message.start else "",
    )


def encode_progress(progress: RunProgress) -> router_pb2.TrainingProgress:
    """Returns the message of a run's progress; of more events than fit, the first, and they are not the last."""
    whole = len(progress.events) <= MAX_EVENTS
    message = router_pb2.TrainingProgress(events_json=progress.events[:MAX_EVENTS], ended=progress.ended and whole)
    if message.ended and progress.error is not None:
        kind = next(name for name, kind in _KINDS if isinstance(progress.error, kind))
        message.failure.CopyFrom(router_pb2.TrainingFailure(kind=kind, message=str(progress.error)))
    return message


def decode_progress(message: router_pb2.TrainingProgress) -> RunProgress:
    """Returns a run's progress of a message. Raises InvalidMessage."""
    error = None
    if message.HasField("failure"):
        kinds = dict(_KINDS)
        if message.failure.kind not in kinds:
            raise InvalidMessage("failure.kind", f"{message.failure.kind[:40]!r}, expected one of {', '.join(kinds)}")
        error = kinds[message.failure.kind](message.failure.message)
    return RunProgress(events=tuple(message.events_json), ended=message.ended, error=error)
