"""The reference pages of settings and metrics are complete and match the code."""

import dataclasses

import pytest

from moecluster.config.load import SECTIONS
from moecluster.config.retired import RETIRED
from tools import metrics_page
from tools.generate_reference_pages import DOCS, PAGES


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: page() for name, page in PAGES.items()}


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_page_is_fresh(pages: dict[str, str], name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == pages[name], "run `make docs` and commit what it writes"


def test_every_setting_has_a_row_in_its_section(pages: dict[str, str]) -> None:
    sections = dict(part.split("\n", 1) for part in pages["configuration.md"].split("\n## ")[1:])
    for name, cls in SECTIONS.items():
        for declared in dataclasses.fields(cls):
            assert f"\n| `{declared.name}` | " in sections[name]
    assert all(f"| `{name}` | " in sections["Renamed and removed settings"] for name in RETIRED)


def test_a_row_says_type_default_and_range(pages: dict[str, str]) -> None:
    for row in (
        "| `betas` | a list of 2 items, each a number | `[0.9, 0.95]` | at least 0 and less than 1 | ",
        '| `durability` | `"checkpoint"` or `"none"` | `"checkpoint"` |  | ',
        '| `placement` | `"contiguous"` or a table | `"contiguous"` |  | ',
        "| `shared_memory_bytes` | an integer | `33554432` (32 MiB) | at least 1048576 (1 MiB) | ",
        "| `capacity_factor` | a number | `1.25` | at least 0 | ",
    ):
        assert f"\n{row}" in pages["configuration.md"]


def test_a_metric_says_who_exports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {metric.name: metric for metric in metrics_page.actor_metrics()}
    by = {name: metric.processes for name, metric in found.items()}
    assert by["moecluster_start_time_seconds"] == ("expert actor", "router", "controller")
    assert by["moecluster_actor_tokens_total"] == ("expert actor",)
    assert by["moecluster_train_loss"] == ("training",)
    assert by["moecluster_expert_replicas"] == by["moecluster_lost_experts"] == ("controller",)
    assert by["moecluster_expert_tokens_quantile"] == ("router",)
    assert by["moecluster_process_cpu_seconds_total"] == by["moecluster_start_time_seconds"]
    assert by["moecluster_time_to_first_token_seconds"] == ("router",)
    assert found["moecluster_dispatch_bytes_total"].labels == ("transport", "direction")
    assert found["moecluster_operation_seconds"].unit == "seconds" and found["moecluster_operation_seconds"].buckets
    assert all(metric.processes == ("gateway",) for metric in metrics_page.gateway_metrics())

    without = {package: process for package, process in metrics_page.PROCESSES.items() if package != "training"}
    monkeypatch.setattr(metrics_page, "PROCESSES", without)
    with pytest.raises(AssertionError, match="moecluster_train_loss: no process sets it"):
        metrics_page.actor_metrics()
