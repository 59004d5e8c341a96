"""The PromQL of the committed Grafana boards."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "k8s" / "components" / "monitoring" / "boards"
METRIC = re.compile(r"moecluster_\w+")
SUFFIX = re.compile(r"_(bucket|sum|count)$")


@dataclass(frozen=True, kw_only=True)
class PanelQuery:
    """One query of one panel."""

    board: str
    panel: str
    expr: str

    @property
    def metrics(self) -> frozenset[str]:
        """The series that it names."""
        return frozenset(METRIC.findall(self.expr))

    def filled(self, values: Mapping[str, str]) -> str:
        """Returns the expression with a value for each of Grafana's variables."""
        expr = self.expr
        for name, value in values.items():
            expr = expr.replace(f"${name}", value)
        assert "$" not in expr, f"{expr}: a variable without a value"
        return expr


def boards() -> dict[str, dict[str, Any]]:
    """Returns the committed boards by their files' names."""
    return {path.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def panel_queries() -> list[PanelQuery]:
    """Returns every query of every panel, also of those in rows that are folded."""
    return [
        PanelQuery(board=name, panel=panel["title"], expr=target["expr"])
        for name, board in boards().items()
        for panel in panels_of(board["panels"])
        for target in panel.get("targets") or ()
    ]


def panels_of(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields panels, and those in rows that are folded."""
    for panel in panels:
        yield panel
        yield from panels_of(panel.get("panels") or [])
