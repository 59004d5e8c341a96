import json

from moecluster.rpc.scrape_targets import ScrapeTarget, scrape_targets, service_discovery
from moecluster.types import ActorPhase, ActorState, ControllerStatus, ProcessInfo, RouterState


def actor(name: str, metrics_address: str, phase: ActorPhase = ActorPhase.SERVING) -> ActorState:
    process = ProcessInfo(metrics_address=metrics_address)
    return ActorState(actor=name, address="", incarnation="", phase=phase, experts=0, restarts=0, process=process)


def test_all_processes_with_metrics_are_targets() -> None:
    status = ControllerStatus(
        term=1,
        generation=1,
        checkpoint="",
        routers=2,
        process=ProcessInfo(metrics_address="h:1"),
        router_states=(
            RouterState(router="router", process=ProcessInfo(metrics_address="h:2")),
            RouterState(router="router-1"),  # it has just joined, and has not said
        ),
        actors=(actor("expert-0", "h:3"), actor("expert-1", "h:4", ActorPhase.RESTARTING), actor("expert-2", "")),
    )
    assert scrape_targets(status) == (
        ScrapeTarget(address="h:1", process="controller", role="controller"),
        ScrapeTarget(address="h:2", process="router", role="router"),
        ScrapeTarget(address="h:3", process="expert-0", role="expert"),
        ScrapeTarget(address="h:4", process="expert-1", role="expert"),
    )


def test_an_address_that_another_process_took_over_is_scraped_once() -> None:
    """Or its tokens would count twice."""
    actors = (actor("expert-0", "h:3", ActorPhase.RESTARTING), actor("expert-1", "h:3"))
    status = ControllerStatus(term=1, generation=1, checkpoint="", routers=0, actors=actors)
    assert [target.process for target in scrape_targets(status)] == ["expert-1"]


def test_a_list_for_prometheus_names_the_scheme_and_the_process() -> None:
    content = service_discovery((ScrapeTarget(address="[::1]:9", process="router", role="router"),), scheme="https")
    labels = {"__scheme__": "https", "process": "router", "role": "router"}
    assert json.loads(content) == [{"targets": ["[::1]:9"], "labels": labels}]
