"""What all boards have: the choice of a data source, model and cluster, links to each other, and rows of panels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
    Row,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    Panel,
    VariableRefresh,
    VariableSort,
)

from tools.grafana.panels import SOURCE

TAG = "moecluster"
EVERYWHERE = "moecluster_start_time_seconds"  # every process shows it from its start on


@dataclass(frozen=True, kw_only=True)
class Section:
    """A row's title, and its panels."""

    title: str
    panels: Sequence[Builder[Panel]]
    collapsed: bool = False


def board(uid: str, title: str, what: str, sections: Sequence[Section], choices: Sequence[QueryVariable] = ()) -> Any:
    """Returns a board. choices: more variables, after those that all boards have."""
    made = (
        Dashboard(f"moecluster / {title}")
        .uid(f"moecluster-{uid}")
        .description(what)
        .tags([TAG])
        .readonly()
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(
            DashboardLink("moecluster")
            .type(DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(choice("model", f"label_values({EVERYWHERE}, model)", "Model"))
        .with_variable(choice("cluster", f'label_values({EVERYWHERE}{{model="$model"}}, cluster)', "Cluster"))
    )
    for variable in choices:
        made = made.with_variable(variable)
    for section in sections:
        row = Row(section.title).collapsed(section.collapsed)
        if section.collapsed:
            for panel in section.panels:
                row = row.with_panel(panel)
        made = made.with_row(row)
        if not section.collapsed:
            for panel in section.panels:
                made = made.with_panel(panel)
    return made.build()


def choice(name: str, values: str, label: str) -> QueryVariable:
    """A variable whose values Prometheus gives."""
    return (
        QueryVariable(name)
        .label(label)
        .query(values)
        .datasource(SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.NUMERICAL_ASC)
    )
