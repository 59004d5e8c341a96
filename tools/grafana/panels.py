"""Panels in the project's style. SEEN selects the series of the model and cluster that a board is set to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from grafana_foundation_sdk.builders import bargauge, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders.common import (
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BigValueColorMode,
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TableColoredBackgroundCellOptions,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    DataTransformerConfig,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SEEN = 'model="$model", cluster="$cluster"'
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RATE = "$__rate_interval"
WIDTH = 24  # of a board, in Grafana's columns
PanelT = TypeVar("PanelT", timeseries.Panel, stat.Panel, bargauge.Panel, table.Panel, heatmap.Panel)
# (from which value on, color); the first holds from the lowest value on.
Steps = Sequence[tuple[float, str]]
GOOD_IS_ZERO: Steps = ((0, "green"), (1, "red"))
NOTE_IF_ONE: Steps = ((0, "green"), (1, "blue"))


@dataclass(frozen=True, kw_only=True)
class Query:
    """One PromQL expression, and the name of its series."""

    expr: str
    name: str = ""


def query(expr: str, name: str = "") -> Query:
    """Returns a query. In expr, SEEN stands for the selected model and cluster."""
    return Query(expr=expr.replace("SEEN", SEEN).replace("RATE", RATE), name=name)


def lines(
    title: str,
    *queries: Query,
    unit: str = "short",
    what: str = "",
    low: float | None = None,
    high: float | None = None,
    stacked: bool = False,
    width: int = 8,
) -> timeseries.Panel:
    """Values over time."""
    panel = (
        timeseries.Panel()
        .unit(unit)
        .fill_opacity(30 if stacked else 8)
        .show_points(VisibilityMode.NEVER)
        .legend(
            VizLegendOptions()
            .display_mode(LegendDisplayMode.TABLE)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
        .min(0 if low is None else low)
    )
    if high is not None:
        panel = panel.max(high)
    if stacked:
        panel = panel.stacking(StackingConfig().mode(StackingMode.NORMAL))
    return _finished(panel, title, what, queries, width=width, height=8)


def number(
    title: str, asked: Query, *, unit: str = "short", what: str = "", steps: Steps = (), width: int = 4
) -> stat.Panel:
    """The newest value, large."""
    panel = (
        stat.Panel()
        .unit(unit)
        .graph_mode(BigValueGraphMode.AREA)
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
        .color_mode(BigValueColorMode.BACKGROUND if steps else BigValueColorMode.VALUE)
        .thresholds(_thresholds(steps or ((0, "blue"),)))
    )
    return _finished(panel, title, what, (asked,), width=width, height=4)


def bars(title: str, asked: Query, *, unit: str = "short", what: str = "", width: int = 12) -> bargauge.Panel:
    """The newest value of every series, as bars."""
    panel = (
        bargauge.Panel()
        .unit(unit)
        .min(0)
        .orientation(VizOrientation.HORIZONTAL)
        .display_mode(BarGaugeDisplayMode.GRADIENT)
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(_thresholds(((0, "blue"),)))
    )
    return _finished(panel, title, what, (asked,), width=width, height=10, instant=True)


def rows(
    title: str, asked: Query, *, hidden: Sequence[str] = (), what: str = "", unit: str = "short", width: int = 12
) -> table.Panel:
    """The newest value of every series, as rows of a table whose columns are the labels."""
    organize = {"excludeByName": dict.fromkeys(("Time", "model", "cluster", *hidden), True)}
    panel = table.Panel().unit(unit).with_transformation(_transformation("organize", organize))
    return _finished(panel, title, what, (asked,), width=width, height=8, instant=True, format_=PromQueryFormat.TABLE)


def matrix(title: str, asked: Query, *, row: str, column: str, unit: str, what: str = "") -> table.Panel:
    """The newest values as a colored table of two labels."""
    options = {"rowField": row, "columnField": column, "valueField": "Value", "emptyValue": "null"}
    panel = (
        table.Panel()
        .unit(unit)
        .min_width(40)
        .with_transformation(_transformation("groupingToMatrix", options))
        .cell_options(TableColoredBackgroundCellOptions())
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.CONTINUOUS_BL_YL_RD))
    )
    return _finished(panel, title, what, (asked,), width=WIDTH, height=12, instant=True, format_=PromQueryFormat.TABLE)


def buckets(title: str, metric: str, *, what: str = "", width: int = 8) -> heatmap.Panel:
    """A histogram of seconds over time. metric: without _bucket."""
    asked = query(f"sum by (le) (rate({metric}_bucket{{SEEN}}[RATE]))", "{{le}}")
    panel = (
        heatmap.Panel()
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Turbo").steps(64))
        .y_axis(heatmap.YAxisConfig().unit("s"))
    )
    return _finished(panel, title, what, (asked,), width=width, height=8, format_=PromQueryFormat.HEATMAP)


def quantiles(metric: str, *labels: str) -> tuple[Query, ...]:
    """Queries for p50, p95 and p99 of a histogram, by these labels. metric: without _bucket."""
    by = ", ".join(("le", *labels))
    names = " ".join(f"{{{{{label}}}}}" for label in labels)
    return tuple(
        query(
            f"histogram_quantile({share}, sum by ({by}) (rate({metric}_bucket{{SEEN}}[RATE])))",
            f"p{share * 100:.0f} {names}".strip(),
        )
        for share in (0.5, 0.95, 0.99)
    )


def _finished(
    panel: PanelT,
    title: str,
    what: str,
    queries: Sequence[Query],
    *,
    width: int,
    height: int,
    instant: bool = False,
    format_: PromQueryFormat = PromQueryFormat.TIME_SERIES,
) -> PanelT:
    panel = panel.title(title).description(what).datasource(SOURCE).span(width).height(height)
    for at, asked in enumerate(queries):
        target = prometheus.Dataquery().expr(asked.expr).ref_id(chr(ord("A") + at)).format(format_).datasource(SOURCE)
        target = target.instant() if instant else target.range()
        panel = panel.with_target(target.legend_format(asked.name) if asked.name else target)
    return panel


def _thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    found = [
        Threshold(value=None if at == 0 else value, color=color)  # the first has no value: it is the base
        for at, (value, color) in enumerate(steps)
    ]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(found)


def _transformation(kind: str, options: Mapping[str, object]) -> DataTransformerConfig:
    return DataTransformerConfig(id_val=kind, options=dict(options))
