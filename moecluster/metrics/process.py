"""Metrics of the process itself: its start, its resources, its build."""

import platform
import time
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import psutil
from prometheus_client.metrics_core import Metric

from moecluster.metrics.declare import Declarations, Kind, MetricGroup

DISTRIBUTIONS = {"version": "moecluster", "ray": "ray", "torch": "torch", "transformers": "transformers"}


class ProcessMetrics(MetricGroup):
    """Shown by every process from its start."""

    def __init__(self, declare: Declarations) -> None:
        super().__init__(declare)
        started = declare.gauge("start_time_seconds", "Unix time at which the process started counting")
        started.labels(*declare.common).set(time.time())
        versions = build_versions()
        declare.gauge(
            "build_info", "Always 1; the labels are versions, empty for a package that is not installed", *versions
        ).labels(*declare.common, *versions.values()).set(1)
        self._process = psutil.Process()
        declare.collect_from(self._resources)

    def _resources(self) -> Iterator[Metric]:
        with self._process.oneshot():
            memory, cpu = self._process.memory_info(), self._process.cpu_times()
            figures: tuple[tuple[Kind, str, str, float], ...] = (
                ("gauge", "process_resident_memory_bytes", "Resident memory of the process", memory.rss),
                ("counter", "process_cpu_seconds", "Processor time of the process", cpu.user + cpu.system),
                ("gauge", "process_open_fds", "Open file descriptors of the process", self._process.num_fds()),
                ("gauge", "process_threads", "Threads of the process", self._process.num_threads()),
            )
        for kind, name, doc, value in figures:
            yield self._declare.family(kind, name, doc, (), [((), float(value))])


@cache
def build_versions() -> dict[str, str]:
    """Label of build_info -> version; empty if the package is not installed."""
    found = {"python": platform.python_version()}
    for label, distribution in DISTRIBUTIONS.items():
        try:
            found[label] = version(distribution)
        except PackageNotFoundError:
            found[label] = ""
    return found
