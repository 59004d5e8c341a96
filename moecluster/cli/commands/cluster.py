"""up, status and down."""

import dataclasses
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from actors import cluster_file
from actors.cluster_file import UpCluster
from actors.launch import bring_up, end_start, take_down
from actors.local_ray import processes_of
from actors.names import CONTROLLER, Endpoints
from actors.ray_poll import RayPoll
from moecluster.cli.common.diagnosis import Diagnosis, of_actors, of_local_ray
from moecluster.cli.common.formatting import operations_table, to_json
from moecluster.cli.common.lookup import found
from moecluster.cli.common.model_target import read_target
from moecluster.cli.common.model_weights import model_to_serve, weights_in
from moecluster.cli.common.progress import loading_bar
from moecluster.cli.common.tables import make_table, show_table
from moecluster.errors import DeadlineExceeded, MoeClusterError, Unavailable
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.types import ActorPhase, ActorState, ControllerStatus, RouterState

STATUS_S = 3.5  # longest time of `status`, not counting the start of its process
ACTOR_PATIENCE, CONTROLLER_PATIENCE = 0.4, 0.6  # fractions of that
LAST_WORDS_S = 0.3  # reserved for printing


def up(target: str, settings: Sequence[str], console: Console, *, random_weights: bool = False) -> None:
    """Brings a cluster up, which runs until `down`."""
    config = read_target(target, settings)
    cluster_file.check()
    model_dir = model_to_serve(config, target, "up", random_weights=random_weights)
    routers = "a router" if config.cluster.num_routers == 1 else f"{config.cluster.num_routers} routers"
    actors = f"{config.cluster.num_expert_actors} expert actors"
    with loading_bar(console, f"starting {actors}, {routers} and a controller") as on_loading:
        cluster = bring_up(config, model_dir, on_loading)
    message = f"cluster {cluster.name} is up and serves {weights_in(cluster.model)}"
    console.print(message, highlight=False, markup=False, soft_wrap=True)
    for address in cluster.router_addresses:
        console.print(f"  router (gRPC)  {address}")
    console.print(f"  Ray            {cluster.ray_address}")
    console.print(f"  secret         {cluster.secret_file}", soft_wrap=True)
    console.print('next: moecluster status | moecluster generate MODEL "PROMPT" | moecluster down', highlight=False)


def down(name: str, console: Console) -> None:
    """Stops what `up` started, and nothing else."""
    if cluster_file.load_start(name) is not None:
        with console.status(f"ending the start of {name}"):
            end_start(name)
        if cluster_file.load(name) is None:
            console.print(f"the start of cluster {name} is ended, and nothing of it is left")
            return
    cluster = found(name)
    with console.status(f"ending {name}"):
        take_down(cluster)
    console.print(f"cluster {name} is down")


def status(name: str, as_json: bool, timeout_s: float, console: Console) -> bool:
    """Shows every actor of a running cluster, and its problems; within the timeout, whatever hangs. Returns whether it
    still serves."""
    deadline_s = time.monotonic() + timeout_s
    cluster = found(name)
    seen, endpoints, diagnosis = _query(cluster, deadline_s)
    if as_json:
        console.print_json(to_json(_plain(cluster, endpoints, seen, diagnosis)))
        return not diagnosis.ended
    message = f"cluster {cluster.name} serves {weights_in(cluster.model)}"
    console.print(message, highlight=False, markup=False, soft_wrap=True)
    for line in _summary(seen) if seen is not None else ():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for replica in seen.replicas_aside if seen is not None else ():
        line = f"expert {replica.expert} of {replica.actor} is {replica.state}: {replica.problem or 'NaN or infinity'}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for problem in diagnosis.problems:
        console.print(f"{diagnosis.status}: {problem}", highlight=False, markup=False, soft_wrap=True)
    for note in diagnosis.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    if diagnosis.ended:
        return False
    show_table(actors_table(endpoints, seen), console)
    if seen is not None and seen.operations:
        show_table(operations_table(seen.operations), console)
    return True


def _query(
    cluster: UpCluster, deadline_s: float
) -> tuple[ControllerStatus | None, dict[str, Endpoints | None], Diagnosis]:
    """Returns the controller's status, Ray's view of the actors, and the diagnosis."""
    local, of_ray = cluster.local_ray, Diagnosis()
    if local is not None:
        of_ray = of_local_ray(local, processes_of(local), cluster.name)
        if of_ray.ended:
            return None, {}, of_ray
    with RayPoll(cluster, ACTOR_PATIENCE * (deadline_s - time.monotonic())) as asked:
        credentials = _noted_credentials(cluster)
        seen = _ask_controller(
            cluster.controller_address, credentials, CONTROLLER_PATIENCE * (deadline_s - time.monotonic())
        )
        endpoints, problem, late = _asked_ray(asked, deadline_s - LAST_WORDS_S - time.monotonic())
    at = endpoints.get(CONTROLLER)
    if seen is None and at is not None and at.address != cluster.controller_address:  # it was restarted
        seen = _ask_controller(at.address, credentials, max(deadline_s - time.monotonic(), LAST_WORDS_S))
    of_actors_ = of_actors(endpoints, seen, at.address if at is not None else cluster.controller_address)
    problems = (*of_ray.problems, *of_actors_.problems, *problem)
    if seen is None:  # then Ray's silence is a part of the trouble
        return seen, endpoints, Diagnosis(problems=problems + late)
    return seen, endpoints, Diagnosis(problems=problems, notes=late)


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


def _ask_controller(address: str, credentials: ClusterCredentials | None, timeout_s: float) -> ControllerStatus | None:
    try:
        with ControllerCalls(address, timeout_s=timeout_s, credentials=credentials) as calls:
            return calls.status()
    except (Unavailable, DeadlineExceeded):
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


def actors_table(endpoints: dict[str, Endpoints | None], seen: ControllerStatus | None) -> Table:
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


def _plain(
    cluster: UpCluster, endpoints: dict[str, Endpoints | None], seen: ControllerStatus | None, diagnosis: Diagnosis
) -> dict[str, object]:
    return {
        "name": cluster.name,
        "status": diagnosis.status,
        "problems": list(diagnosis.problems),
        "notes": list(diagnosis.notes),
        "model": cluster.model,
        "weights": dataclasses.asdict(weights_in(cluster.model)),
        "ray_address": cluster.ray_address,
        "actors": {name: dataclasses.asdict(e) if e is not None else None for name, e in endpoints.items()},
        "controller": dataclasses.asdict(seen) if seen is not None else None,
    }
