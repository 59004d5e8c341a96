"""up and down."""

import time
from collections.abc import Sequence

from rich.console import Console

from actors import cluster_file
from actors.launch import bring_up, end_start, take_down
from moecluster.cli.common.cluster_choice import ClusterChoice, RemoteCluster
from moecluster.cli.common.lookup import found
from moecluster.cli.common.model_target import read_target
from moecluster.cli.common.model_weights import model_to_serve, weights_in
from moecluster.cli.common.progress import loading_bar
from moecluster.errors import DeadlineExceeded, Unavailable
from moecluster.rpc.controller.client import ControllerCalls

END_TIMEOUT_S = 60.0  # of a cluster at an address
POLL_S = 0.2


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
    console.print(f"  controller     {cluster.controller_address}")
    console.print(f"  Ray            {cluster.ray_address}")
    console.print(f"  secret         {cluster.secret_file}", soft_wrap=True)
    console.print('next: moecluster status | moecluster generate MODEL "PROMPT" | moecluster down', highlight=False)


def down_at(choice: ClusterChoice, console: Console) -> None:
    """Has the controller at an address end its cluster. Raises DeadlineExceeded if it still answers after a while."""
    deadline_s = time.monotonic() + END_TIMEOUT_S
    with console.status(f"ending {choice}"), RemoteCluster(choice).calls() as calls:
        calls.shut_down()
        while _answers(calls):
            if time.monotonic() > deadline_s:
                raise DeadlineExceeded(
                    f"{choice} has not ended within {END_TIMEOUT_S:g} s; its controller's log says why"
                )
            time.sleep(POLL_S)
    console.print(f"{choice} is down", highlight=False)


def _answers(calls: ControllerCalls) -> bool:
    try:
        calls.status()
    except DeadlineExceeded:
        return True  # it is busy ending
    except Unavailable:
        return False
    return True


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
