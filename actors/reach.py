"""Has the actors of a cluster prove that they reach each other, before its start counts as a success."""

import logging
from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.names import CONTROLLER, EXPERT_PREFIX, SOURCE, Endpoints, is_router
from actors.ray_calls import call
from moecluster.errors import ResourceError
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.reach import Gap, Peer, complaint, must_reach, unreached

logger = logging.getLogger(__name__)

REACH_TIMEOUT_S = 20.0  # for a connection and a health check, on a busy machine
ANSWER_TIMEOUT_S = 60.0  # for an actor to say what it does not reach


def prove_reach(
    handles: Mapping[str, "ActorHandle[Any]"], endpoints: Mapping[str, Endpoints], credentials: ClusterCredentials
) -> None:
    """Raises ResourceError naming who does not reach whom. Only warns if this host does not reach the routers: it may
    lie outside of the cluster's network. handles, endpoints: of all actors."""
    peers = {name: _peer(found) for name, found in endpoints.items()}
    routers = [peer for name, peer in peers.items() if is_router(name)]
    wanted = must_reach(
        routers=routers,
        experts=[peer for name, peer in peers.items() if name.startswith(EXPERT_PREFIX)],
        controller=peers[CONTROLLER],
        source=peers.get(SOURCE),
    )
    asked: dict[str, Any] = {
        name: handles[name].unreached.remote(targets, REACH_TIMEOUT_S) for name, targets in wanted.items()
    }
    gaps = [
        Gap(source=name, node=peers[name].node, missing=missing)
        for name, reference in asked.items()
        for missing in call(reference, ANSWER_TIMEOUT_S, name)
    ]
    if gaps:
        raise ResourceError(complaint(gaps))
    here = str(ray.util.get_node_ip_address())
    away = unreached(routers, credentials=credentials, timeout_s=REACH_TIMEOUT_S)
    if away:
        shown = "; ".join(str(Gap(source="this command", node=here, missing=missing)) for missing in away)
        logger.warning("note: %s; the cluster serves, but not to this host", shown)


def _peer(endpoints: Endpoints) -> Peer:
    return Peer(actor=endpoints.actor, address=endpoints.address, server_id=endpoints.server_id, node=endpoints.node)
