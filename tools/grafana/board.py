"""What all boards have: the choice of a data source, model and cluster, links to each other, and rows of panels."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders.dashboard import Dashboard as DashboardBuilder
from grafana_foundation_sdk.builders.dashboard import DashboardLink, DatasourceVariable, QueryVariable, Row
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    Panel,
    RowPanel,
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


def board(
    uid: str, title: str, what: str, sections: Sequence[Section], choices: Sequence[QueryVariable] = ()
) -> Dashboard:
    """Returns a board. choices: more variables, after those that all boards have."""
    made = (
        DashboardBuilder(f"moecluster / {title}")
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
    built = made.build()
    _number(built.panels or ())
    return built


def _number(panels: Iterable[Panel | RowPanel]) -> None:
    """Gives each panel an id: Grafana's links to one panel name it."""
    numbers = itertools.count(1)
    for panel in panels:
        panel.id_val = next(numbers)
        for inner in panel.panels if isinstance(panel, RowPanel) else ():
            inner.id_val = next(numbers)


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
