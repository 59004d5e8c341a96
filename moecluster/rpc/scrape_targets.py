"""What Prometheus scrapes of a cluster, in the form of its HTTP service discovery."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from moecluster.types import ControllerStatus

CONTROLLER = "controller"


@dataclass(frozen=True, kw_only=True)
class ScrapeTarget:
    """A process with /metrics."""

    address: str  # host:port
    process: str  # the name of its actor, which is the same after a restart at another address
    role: str  # router, controller or expert


def scrape_targets(status: ControllerStatus) -> tuple[ScrapeTarget, ...]:
    """Returns the processes of a cluster that have /metrics, in order. A lost one stays until it is known elsewhere."""
    return tuple({target.address: target for target in _all(status)}.values())


def _all(status: ControllerStatus) -> Iterator[ScrapeTarget]:
    if status.process.metrics_address:
        yield ScrapeTarget(address=status.process.metrics_address, process=CONTROLLER, role=CONTROLLER)
    for router in status.router_states:
        if router.process.metrics_address:
            yield ScrapeTarget(address=router.process.metrics_address, process=router.router, role="router")
    for actor in status.actors:
        if actor.process.metrics_address:
            yield ScrapeTarget(address=actor.process.metrics_address, process=actor.actor, role="expert")


def service_discovery(targets: tuple[ScrapeTarget, ...], *, scheme: str) -> bytes:
    """Returns the JSON that Prometheus' http_sd_configs expects. scheme: http or https, of all processes."""
    groups = [
        {
            "targets": [target.address],
            "labels": {"__scheme__": scheme, "process": target.process, "role": target.role},
        }
        for target in targets
    ]
    return json.dumps(groups).encode()
