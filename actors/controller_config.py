"""Derives the controller's settings from the configuration."""

from collections.abc import Mapping

from actors.names import expert_names, most_expert_actors, most_routers
from moecluster.config import Config
from moecluster.controller.load.direct import LoadSource
from moecluster.controller.load.prometheus import PrometheusLoadSource
from moecluster.controller.operations.routers import RouterSizingSettings
from moecluster.controller.operations.weight_rollout import UpdateSettings
from moecluster.controller.rebalance.apply import ApplierSettings
from moecluster.controller.rebalance.observe import ObserverSettings
from moecluster.controller.reconciler import ReconcilerSettings
from moecluster.controller.settings import ControllerSettings
from moecluster.errors import ConfigError
from moecluster.placement.scaling import RouterSizeSettings, SizeSettings
from moecluster.rpc.controller.subscription import MAX_BACKOFF_S
from moecluster.types import Replica

# An update goes on without a router of which nothing was heard for so many leases, and the longest pause between two
# of its attempts to find a controller.
GRACE_LEASES = 3
REPORT_AGE_PERIODS = 5  # health checks: an actor that has not answered one for so long says nothing about its load
STRAY_LEASES = 2  # a controller that has been replaced has found out by then


def controller_settings(
    config: Config, model_dir: str, replicas: tuple[Replica, ...], layer_experts: Mapping[int, int]
) -> ControllerSettings:
    """Returns the controller's settings for a cluster that serves a model."""
    controller, cluster = config.controller, config.cluster
    size = size_limits(config)
    return ControllerSettings(
        actors=expert_names(config),
        replicas=replicas,
        layer_experts=layer_experts,
        checkpoint=model_dir,
        dtype=config.model.dtype,
        lease_s=controller.lease_s,
        health_period_s=controller.health_period_s,
        start_timeout_s=cluster.start_timeout_s,
        load_timeout_s=cluster.start_timeout_s,
        min_actors=controller.min_expert_actors or 1,
        max_actors=most_expert_actors(config),
        observer=ObserverSettings(
            window=controller.window,
            window_s=controller.window_s,
            slots_per_layer=slots_per_layer(config, layer_experts, replicas),
            budget_bytes=controller.move_budget_bytes,
            burst=controller.move_burst,
        ),
        reconciler=ReconcilerSettings(
            policy=controller.policy,
            period_s=controller.period_s,
            quiet_s=controller.lease_s,
            operation_timeout_s=controller.operation_timeout_s,
            scale_to_zero_after_s=controller.scale_to_zero_after_s,
            size=size,
            report_age_s=REPORT_AGE_PERIODS * controller.health_period_s,
            stray_s=STRAY_LEASES * controller.lease_s,
        ),
        applier=ApplierSettings(
            dtype=config.model.dtype,
            load_timeout_s=cluster.start_timeout_s,
            drain_timeout_s=controller.drain_timeout_s,
            max_bytes_per_s=controller.max_move_bytes_per_s,
        ),
        update=UpdateSettings(
            prepare_timeout_s=controller.operation_timeout_s,
            old_requests_timeout_s=controller.update_timeout_s,
            router_grace_s=GRACE_LEASES * controller.lease_s + MAX_BACKOFF_S,
        ),
        routers=RouterSizingSettings(
            min_routers=config.serve.min_routers or 1,
            max_routers=most_routers(config),
            size=router_limits(config),
            period_s=controller.period_s,
            lease_s=controller.lease_s,
            start_timeout_s=controller.operation_timeout_s,
            drain_timeout_s=config.serve.router_drain_timeout_s,
        ),
    )


def size_limits(config: Config) -> SizeSettings | None:
    """Returns the limits and targets of the number of expert actors; None without autoscaling. Raises ConfigError if
    the initial number is outside the limits."""
    controller, actors = config.controller, config.cluster.num_expert_actors
    if not controller.min_expert_actors and not controller.max_expert_actors:
        return None
    lowest, highest = controller.min_expert_actors or actors, controller.max_expert_actors or actors
    if not lowest <= actors <= highest:
        raise ConfigError(
            f"cluster.num_expert_actors: got {actors}, expected {lowest} to {highest} "
            "(controller.min_expert_actors, controller.max_expert_actors)"
        )
    return SizeSettings(
        min_actors=lowest,
        max_actors=highest,
        target_queue_s=controller.target_queue_s,
        target_utilization=controller.target_utilization,
        upscale_delay_s=controller.upscale_delay_s,
        downscale_delay_s=controller.downscale_delay_s,
    )


def router_limits(config: Config) -> RouterSizeSettings | None:
    """Returns the limits and targets of the number of routers; None without autoscaling. Raises ConfigError if the
    initial number is outside the limits."""
    serve, routers = config.serve, config.cluster.num_routers
    if not serve.min_routers and not serve.max_routers:
        return None
    lowest, highest = serve.min_routers or routers, serve.max_routers or routers
    if not lowest <= routers <= highest:
        raise ConfigError(
            f"cluster.num_routers: got {routers}, expected {lowest} to {highest} (serve.min_routers, serve.max_routers)"
        )
    return RouterSizeSettings(
        min_routers=lowest,
        max_routers=highest,
        target_requests=serve.target_requests,
        target_waiting=serve.target_waiting,
        upscale_delay_s=serve.upscale_delay_s,
        downscale_delay_s=serve.downscale_delay_s,
    )


def slots_per_layer(config: Config, layer_experts: Mapping[int, int], replicas: tuple[Replica, ...]) -> int:
    """Returns an actor's slots for replicas of each layer. By default just enough for the smallest cluster to hold all
    experts and the redundant ones, and for the first placement. Raises ConfigError if the setting is too small."""
    controller = config.controller
    taken: dict[tuple[str, int], int] = {}
    for r in replicas:
        taken[r.actor, r.expert.layer] = taken.get((r.actor, r.expert.layer), 0) + 1
    most, given = max(taken.values()), controller.slots_per_layer
    if given and given < most:
        raise ConfigError(
            f"controller.slots_per_layer: got {given}, and the first placement puts {most} experts of a layer on one "
            f"actor; expected at least {most}"
        )
    fewest = min(controller.min_expert_actors or config.cluster.num_expert_actors, config.cluster.num_expert_actors)
    return given or max(most, -(-(max(layer_experts.values()) + controller.num_redundant_experts) // fewest))


def load_source(config: Config, layer_experts: Mapping[int, int]) -> LoadSource | None:
    """Returns a source for the Prometheus server in the settings; None to use the routers' own reports."""
    if config.controller.load_source == "direct":
        return None
    return PrometheusLoadSource(
        config.controller.prometheus_address, cluster=config.cluster.name, layer_experts=layer_experts
    )
