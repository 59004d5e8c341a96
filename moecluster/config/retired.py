"""Settings of earlier versions that were renamed or removed.

The error for a renamed setting tells the new name. To rename or remove a setting, add a line here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moecluster.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Renamed:
    """The setting has a new name; its values have the same meaning."""

    to: str  # "section.key"

    def __str__(self) -> str:
        return f"was renamed {self.to}"


@dataclass(frozen=True, kw_only=True)
class Removed:
    """The setting is gone."""

    because: str

    def __str__(self) -> str:
        return f"was removed: {self.because}"


RETIRED: Mapping[str, Renamed | Removed] = {
    "cluster.max_message_bytes": Removed(because="gRPC messages are limited to 256 MiB"),
    "controller.target_utilisation": Renamed(to="controller.target_utilization"),
    "router.max_inflight_bytes": Removed(
        because="experts.max_queue_bytes limits the rows that wait in an expert actor"
    ),
    "serve.router_patience_s": Renamed(to="serve.router_wait_timeout_s"),
    "serve.target_texts": Renamed(to="serve.target_requests"),
    "train.deterministic": Removed(because="gradients are always summed in the same order"),
    "train.max_left_out_share": Renamed(to="train.max_skipped_share"),
}


def refuse_retired(tables: Mapping[str, Any]) -> None:
    """Raises one ConfigError for all settings in the tables that were renamed or removed."""
    given = [f"{section}.{key}" for section, table in tables.items() if isinstance(table, Mapping) for key in table]
    if found := [f"{name} {RETIRED[name]}" for name in given if name in RETIRED]:
        raise ConfigError("; ".join(found))


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translates settings ("section.key" -> value) that an earlier version saved: renames them, drops removed ones."""
    current: dict[str, Any] = {}
    for name, value in settings.items():
        match RETIRED.get(name):
            case None:
                current[name] = value
            case Renamed(to=to):
                current[to] = value
    return current
