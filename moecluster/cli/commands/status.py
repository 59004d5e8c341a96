"""status: shows every actor of a running cluster, and its problems."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from actors.cluster_file import UpCluster
from actors.local_ray import processes_of
from actors.names import CONTROLLER, Endpoints
from actors.ray_poll import RayPoll
from moecluster.cli.common.cluster_choice import ClusterChoice, RemoteCluster
from moecluster.cli.common.diagnosis import Diagnosis, of_actors, of_local_ray
from moecluster.cli.common.formatting import operations_table, to_json
from moecluster.cli.common.lookup import found
from moecluster.cli.common.model_weights import weights_in
from moecluster.cli.common.tables import make_table, show_table
from moecluster.errors import DeadlineExceeded, MoeClusterError, TlsMismatch, Unauthenticated, Unavailable
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.tls.mismatch import mismatch_at
from moecluster.types import ActorPhase, ActorState, ControllerStatus, ProcessInfo, RouterState

STATUS_S = 3.5  # longest time of `status`, not counting the start of its process
# Fractions of it: for a controller that is well; for one that may hang, beside Ray; and for Ray's actors.
FIRST_PATIENCE, CONTROLLER_PATIENCE, ACTOR_PATIENCE = 0.25, 0.6, 0.4
LAST_WORDS_S = 0.3  # reserved for printing


@dataclass(frozen=True, kw_only=True)
class View:
    """What is known of a cluster."""

    name: str
    model: str  # the directory that it serves
    ray_address: str  # empty: not known
    seen: ControllerStatus | None  # None: the controller does not answer
    endpoints: Mapping[str, Endpoints | None]  # by actor; None: it does not answer
    diagnosis: Diagnosis


def status(choice: ClusterChoice, as_json: bool, timeout_s: float, console: Console) -> bool:
    """Shows every actor of a running cluster, and its problems; within the timeout, whatever hangs. Returns whether it
    still serves."""
    deadline_s = time.monotonic() + timeout_s
    view = _view_at(choice, deadline_s) if choice.address else _view_of(found(choice.name), deadline_s)
    if as_json:
        console.print_json(to_json(_plain(view)))
        return not view.diagnosis.ended
    message = f"cluster {view.name} serves {weights_in(view.model)}"
    console.print(message, highlight=False, markup=False, soft_wrap=True)
    seen = view.seen
    for line in _summary(seen) if seen is not None else ():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for router in seen.router_states if seen is not None else ():
        for lane in router.inline_lanes:
            line = f"rows of {router.router} travel inline to {lane}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    for replica in seen.replicas_aside if seen is not None else ():
        line = f"expert {replica.expert} of {replica.actor} is {replica.state}: {replica.problem or 'NaN or infinity'}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for problem in view.diagnosis.problems:
        console.print(f"{view.diagnosis.status}: {problem}", highlight=False, markup=False, soft_wrap=True)
    for note in view.diagnosis.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    if view.diagnosis.ended:
        return False
    show_table(actors_table(view.endpoints, seen), console)
    if seen is not None and seen.operations:
        show_table(operations_table(seen.operations), console)
    return True


def _view_at(choice: ClusterChoice, deadline_s: float) -> View:
    """Returns the view of a cluster by its controller alone. Raises Unavailable if that does not answer."""
    cluster = RemoteCluster(choice)
    seen = _ask_controller(cluster.address, cluster.credentials, deadline_s - LAST_WORDS_S - time.monotonic())
    if seen is None:
        left_s = max(deadline_s - time.monotonic(), LAST_WORDS_S)
        silent = Unavailable(f"no controller answers at {cluster.address}")
        raise mismatch_at(cluster.address, cluster.credentials, timeout_s=left_s) or silent
    endpoints = endpoints_in(seen, cluster.address)
    return View(
        name=seen.cluster or cluster.address,
        model=seen.checkpoint,
        ray_address="",
        seen=seen,
        endpoints=endpoints,
        diagnosis=of_actors(endpoints, seen, cluster.address),
    )


def _view_of(cluster: UpCluster, deadline_s: float) -> View:
    """Returns the view of a cluster that `up` recorded. Ray is asked only if the controller is silent."""
    local, of_ray = cluster.local_ray, Diagnosis()
    if local is not None:
        of_ray = of_local_ray(local, processes_of(local), cluster.name)
        if of_ray.ended:
            return _view(cluster, None, {}, of_ray)
    credentials = _noted_credentials(cluster)
    seen = _ask_controller(
        cluster.controller_address, credentials, FIRST_PATIENCE * (deadline_s - time.monotonic()), silent_if_wrong=True
    )
    if seen is not None:
        endpoints = endpoints_in(seen, cluster.controller_address)
        of_actors_ = of_actors(endpoints, seen, cluster.controller_address)
        return _view(cluster, seen, endpoints, Diagnosis(problems=(*of_ray.problems, *of_actors_.problems)))
    return _view_with_ray(cluster, of_ray, credentials, deadline_s)


def _view_with_ray(
    cluster: UpCluster, of_ray: Diagnosis, credentials: ClusterCredentials | None, deadline_s: float
) -> View:
    """Returns the view of a cluster whose controller is silent, hangs, or listens elsewhere."""
    with RayPoll(cluster, ACTOR_PATIENCE * (deadline_s - time.monotonic())) as asked:
        seen = _ask_controller(
            cluster.controller_address,
            credentials,
            CONTROLLER_PATIENCE * (deadline_s - time.monotonic()),
            silent_if_wrong=True,
        )
        endpoints, problem, late = _asked_ray(asked, deadline_s - LAST_WORDS_S - time.monotonic())
    at = endpoints.get(CONTROLLER)
    if seen is None and at is not None and at.address != cluster.controller_address:  # it was restarted
        left_s = max(deadline_s - time.monotonic(), LAST_WORDS_S)
        seen = _ask_controller(at.address, credentials, left_s, silent_if_wrong=True)
    address = at.address if at is not None else cluster.controller_address
    problems = (*of_ray.problems, *of_actors(endpoints, seen, address).problems, *problem)
    if seen is None:  # then Ray's silence is a part of the trouble
        return _view(cluster, seen, endpoints, Diagnosis(problems=problems + late))
    return _view(cluster, seen, endpoints or endpoints_in(seen, address), Diagnosis(problems=problems, notes=late))


def _view(
    cluster: UpCluster,
    seen: ControllerStatus | None,
    endpoints: Mapping[str, Endpoints | None],
    diagnosis: Diagnosis,
) -> View:
    return View(
        name=cluster.name,
        model=cluster.model,
        ray_address=cluster.ray_address,
        seen=seen,
        endpoints=endpoints,
        diagnosis=diagnosis,
    )


def endpoints_in(seen: ControllerStatus, controller_address: str) -> dict[str, Endpoints | None]:
    """Returns the actors' endpoints as the controller knows them; None for one that is being started."""
    known = [(CONTROLLER, controller_address, seen.process)]
    known += [(s.router, s.address, s.process) for s in seen.router_states]
    known += [(a.actor, a.address if a.phase is not ActorPhase.RESTARTING else "", a.process) for a in seen.actors]
    return {actor: _endpoints(actor, address, process) if address else None for actor, address, process in known}


def _endpoints(actor: str, address: str, process: ProcessInfo) -> Endpoints:
    return Endpoints(
        actor=actor,
        pid=process.pid,
        address=address,
        metrics_address=process.metrics_address,
        node=process.node,
        nice=process.nice,
    )


def _asked_ray(poll: RayPoll, timeout_s: float) -> tuple[dict[str, Endpoints | None], tuple[str, ...], tuple[str, ...]]:
    """Returns the actors' endpoints, Ray's problem if there is one, and a note if Ray did not answer in time."""
    try:
        endpoints, problem = poll.wait(timeout_s)
    except DeadlineExceeded as exc:
        return {}, (), (f"{exc}; --timeout-s gives it longer",)
    return endpoints, (problem,) if problem else (), ()


def _noted_credentials(cluster: UpCluster) -> ClusterCredentials | None:
    """Returns the credentials from the cluster's file only: other sources may hang. None if it is not readable."""
    try:
        return cluster.read_credentials() if cluster.secret_file else None
    except MoeClusterError:
        return None


def _ask_controller(
    address: str, credentials: ClusterCredentials | None, timeout_s: float, *, silent_if_wrong: bool = False
) -> ControllerStatus | None:
    """silent_if_wrong: a controller that asks for other credentials counts as silent: another cluster took the port."""
    try:
        with ControllerCalls(address, timeout_s=timeout_s, credentials=credentials) as calls:
            return calls.status()
    except (Unavailable, DeadlineExceeded) as exc:
        if isinstance(exc, Unauthenticated | TlsMismatch) and not silent_if_wrong:
            raise
        return None


def _summary(seen: ControllerStatus) -> list[str]:
    held = ", held while a run trains" if seen.held else ""
    cold = f", {seen.cold_experts} experts unloaded until a token wants them" if seen.cold_experts else ""
    return [
        f"term {seen.term}, placement {seen.generation}{held}: {seen.replicas} replicas{cold}",
        f"policy {seen.policy}, routers with a lease: {seen.routers}",
        f"weight version {seen.weight_version}: {seen.checkpoint}{_older(seen)}",
    ]


def _older(seen: ControllerStatus) -> str:
    """Names the routers that still generate with older weights."""
    behind = [s.router for s in seen.router_states if 0 < s.oldest_weight_version < seen.weight_version]
    return f"; requests with older weights still run on {', '.join(behind)}" if behind else ""


def actors_table(endpoints: Mapping[str, Endpoints | None], seen: ControllerStatus | None) -> Table:
    """Returns a table with one row per actor: its addresses, and its state if the controller answers."""
    columns = ("actor", "phase", "experts", "restarts", "running", "waiting", "gRPC", "/metrics", "pid")
    table = make_table(*columns, box=None, pad_edge=False)
    states = {actor.actor: actor for actor in seen.actors} if seen is not None else {}
    routers = {router.router: router for router in seen.router_states} if seen is not None else {}
    for name in sorted(endpoints.keys() | states.keys() | routers.keys()):
        reached, router = endpoints.get(name), routers.get(name)
        table.add_row(
            name,
            _phase(reached, states.get(name), router),
            str(states[name].experts) if name in states else "",
            str(states[name].restarts) if name in states else "",
            str(router.running) if router else "",
            str(router.waiting) if router else "",
            reached.address if reached else _address_shown(states.get(name), routers.get(name)),
            reached.metrics_address if reached else "",
            str(reached.pid) if reached else "",
        )
    return table


def _phase(reached: Endpoints | None, actor: ActorState | None, router: RouterState | None) -> str:
    if actor is not None:
        return actor.phase
    if router is not None and router.leaving:
        return "leaving"
    return ActorPhase.SERVING if reached is not None or router is not None else ActorPhase.RESTARTING


def _address_shown(actor: ActorState | None, router: RouterState | None) -> str:
    """Returns the address known to the controller, where Ray does not answer."""
    return (actor.address if actor is not None else "") or (router.address if router is not None else "")


def _plain(view: View) -> dict[str, object]:
    return {
        "name": view.name,
        "status": view.diagnosis.status,
        "problems": list(view.diagnosis.problems),
        "notes": list(view.diagnosis.notes),
        "model": view.model,
        "weights": dataclasses.asdict(weights_in(view.model)),
        "ray_address": view.ray_address,
        "actors": {name: dataclasses.asdict(e) if e is not None else None for name, e in view.endpoints.items()},
        "controller": dataclasses.asdict(view.seen) if view.seen is not None else None,
    }
