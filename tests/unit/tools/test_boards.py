"""The Grafana boards are what the code says now, and name metrics and labels that exist."""

import re

import pytest

from tests.support.board_queries import SUFFIX, PanelQuery, boards, panel_queries, panels_of
from tools.generate_boards import BOARDS, FOLDER, content
from tools.metrics_page import ShownMetric, actor_metrics, gateway_metrics

COMMON = {"model", "cluster"}
SCRAPED = {"instance", "le"}  # labels of the scrape, and of histograms
SELECTOR = re.compile(r"(moecluster_\w+)\{([^}]*)\}")
MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
GROUPING = re.compile(r"\bby \(([^)]*)\)")
# Shown elsewhere, or of no use in a picture.
NOT_ON_BOARDS = {
    "moecluster_expert_tokens_quantile",  # the boards show the hottest and coldest experts, and the skew
    "moecluster_hidden_replicas",  # for the planner, whether it sees all counters
    "moecluster_process_threads",
}


@pytest.fixture(scope="module")
def metrics() -> dict[str, ShownMetric]:
    return {metric.name: metric for metric in (*actor_metrics(), *gateway_metrics())}


def metric_of(series: str, metrics: dict[str, ShownMetric]) -> ShownMetric:
    """Returns the metric that a series is of."""
    found = metrics.get(series) or metrics.get(SUFFIX.sub("", series))
    assert found is not None, f"there is no metric {series}"
    assert bool(found.buckets) == (series not in metrics), f"{series}: a histogram has no series of its own name"
    return found


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_is_fresh(name: str) -> None:
    assert (FOLDER / name).read_text() == content(BOARDS[name]), "make docs"


@pytest.mark.parametrize("query", panel_queries(), ids=lambda query: f"{query.board}: {query.panel}")
def test_a_query_names_what_exists(query: PanelQuery, metrics: dict[str, ShownMetric]) -> None:
    named = {series: metric_of(series, metrics) for series in query.metrics}
    selected = SELECTOR.findall(query.expr)
    assert {series for series, _ in selected} == named.keys(), "every series is of the chosen model and cluster"
    for series, matchers in selected:
        assert set(MATCHER.findall(matchers)) <= {*COMMON, *named[series].labels}, series
        assert set(MATCHER.findall(matchers)) >= COMMON, series
    shown = {label for metric in named.values() for label in metric.labels}
    for labels in GROUPING.findall(query.expr):
        assert set(labels.replace(" ", "").split(",")) <= shown | SCRAPED, query.expr


def test_every_metric_is_on_a_board(metrics: dict[str, ShownMetric]) -> None:
    shown = {metric_of(series, metrics).name for query in panel_queries() for series in query.metrics}
    assert metrics.keys() - shown == NOT_ON_BOARDS


def test_no_two_boards_or_panels_are_taken_for_one_another() -> None:
    found = boards()
    assert len({board["uid"] for board in found.values()}) == len(found) == len(BOARDS)
    for board in found.values():
        panels = list(panels_of(board["panels"]))
        assert len({panel["id"] for panel in panels}) == len(panels)
        places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
        assert len(places) == len(panels)
