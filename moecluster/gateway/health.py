"""Health of the models behind a gateway, with reasons."""

from collections.abc import Sequence
from typing import Literal

from moecluster.gateway.api_errors import LOST_EXPERTS
from moecluster.gateway.schemas.responses import Health
from moecluster.gateway.served_model import ServedModel
from moecluster.types import ActorPhase


def health_of(models: Sequence[ServedModel]) -> Health:
    """Ready: nothing is wrong. Degraded: every model has a router, but something is wrong. Not ready: a model has no
    router that answers."""
    routers = {model.name: model.discovery.answering for model in models}
    reasons = [reason for model in models for reason in _reasons(model)]
    status: Literal["ready", "degraded", "not ready"] = "degraded" if reasons else "ready"
    if not all(routers.values()):
        status = "not ready"
    return Health(status=status, reasons=reasons, routers=routers)


def _reasons(model: ServedModel) -> list[str]:
    """Returns what is wrong with one model. Reveals no address and no path: /health needs no API key."""
    discovery = model.discovery
    if not discovery.answering:
        return [f"{model.name}: {discovery.ended or 'no router answers'}"]
    seen = discovery.cluster
    if seen is None:
        silent = "no controller answers; what is lost does not come back before one does"
        return [f"{model.name}: {silent}"] if discovery.has_controller else []
    reasons = [f"{actor.actor} is {actor.phase}" for actor in seen.actors if actor.phase is not ActorPhase.SERVING]
    if seen.lost_experts and any(actor.problem for actor in seen.actors):
        reasons.append(f"it {LOST_EXPERTS}")
    elif seen.lost_experts:
        reasons.append(f"{seen.lost_experts} experts have no serving replica at the moment")
    return [f"{model.name}: {reason}" for reason in reasons]
