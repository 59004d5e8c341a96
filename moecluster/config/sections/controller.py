"""Settings of the section [controller]."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from moecluster.config.fields import MIB, Section, setting


@dataclass(frozen=True, kw_only=True)
class ControllerConfig(Section):
    """How experts are placed and moved, and how the number of expert actors follows the load."""

    section: ClassVar[str] = "controller"

    placement: str | Mapping[str, tuple[str, ...]] = setting(
        "contiguous",
        "Initial placement: contiguous, or a table of actor = list of layer/index, where layer * is every MoE "
        'layer, for example `{ expert-0 = ["0/3", "*/1"] }`.',
        choices=("contiguous",),
    )
    lease_s: float = setting(
        10.0, "Router lease: unloading an expert waits this long for a router that has stopped reporting.", above=0
    )
    health_period_s: float = setting(1.0, "Interval between health checks of the expert actors.", above=0)

    policy: str = setting("share", "Placement policy: share, eplb, or static, which moves nothing.")
    period_s: float = setting(2.0, "Interval between decisions about placement and size.", above=0)
    load_source: str = setting(
        "direct",
        "Source of the experts' loads: the routers' reports (direct), or a Prometheus server.",
        choices=("direct", "prometheus"),
    )
    prometheus_address: str = setting(
        "", "Prometheus server that scrapes the actors, as http://host:port. Required if load_source is prometheus."
    )
    window_s: float = setting(30.0, "Time span of the load that decisions are based on.", above=0)
    window: str = setting(
        "exponential",
        "Weights within window_s: exponential (half-life window_s / 2) or sliding (all tokens count the same).",
        choices=("exponential", "sliding"),
    )
    slots_per_layer: int = setting(
        0,
        "Replicas of each layer that an expert actor has room for. 0: just enough for all experts and "
        "num_redundant_experts.",
        minimum=0,
    )
    num_redundant_experts: int = setting(
        0, "Replicas of each layer, beyond one per expert, that slots_per_layer = 0 leaves room for.", minimum=0
    )
    move_budget_bytes: int = setting(
        1024 * MIB,
        "Expert weights that one decision may load, move_burst aside. 0: decisions change only shares.",
        minimum=0,
    )
    move_burst: float = setting(
        3.0,
        "Budgets that a decision may borrow from later decisions when more moves pay off, for example when the "
        "topic changes at once. 0: none.",
        minimum=0,
    )
    max_move_bytes_per_s: int = setting(
        0, "Rate limit for copying an expert from actor to actor. 0: no limit.", minimum=0
    )
    drain_timeout_s: float = setting(
        10.0, "Longest wait for routers and queues to finish with an expert before it is unloaded.", above=0
    )
    operation_timeout_s: float = setting(
        600.0,
        "Longest wait for an actor that an operation has requested, or for all processes to load new weights.",
        above=0,
    )
    update_timeout_s: float = setting(
        3600.0,
        "How long requests that started before a weight update may use the old weights. Should cover the longest "
        "request.",
        above=0,
    )

    min_expert_actors: int = setting(
        0, "Lower bound for autoscaling. 0: disables scale-down (`moecluster scale` may still go down to 1).", minimum=0
    )
    max_expert_actors: int = setting(
        0,
        "Upper bound for autoscaling. 0: disables scale-up (`moecluster scale` may still go up to 4 times "
        "cluster.num_expert_actors).",
        minimum=0,
    )
    target_queue_s: float = setting(
        0.05, "Average time that messages may wait in an expert actor before an expert actor is added.", above=0
    )
    target_utilization: float = setting(
        0.7, "Fraction of the time that expert actors should be computing; autoscaling aims at it.", above=0, maximum=1
    )
    upscale_delay_s: float = setting(
        30.0, "How long more expert actors must be needed before they are started.", minimum=0
    )
    downscale_delay_s: float = setting(
        600.0, "How long fewer expert actors must be enough before some are drained.", minimum=0
    )
    scale_to_zero_after_s: float = setting(
        0.0, "Experts without tokens for this long are unloaded until a token needs them. 0: never.", minimum=0
    )

    def check(self) -> None:
        if self.load_source == "prometheus" and not self.prometheus_address.startswith(("http://", "https://")):
            raise self.complain("prometheus_address", "expected http://host:port, as load_source is prometheus")
        if self.max_expert_actors and self.max_expert_actors < self.min_expert_actors:
            raise self.complain("max_expert_actors", f"expected at least min_expert_actors = {self.min_expert_actors}")
