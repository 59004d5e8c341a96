from rich.console import Console

from actors.names import Endpoints
from moecluster.cli.commands.status import actors_table
from moecluster.types import ActorPhase, ActorState, ControllerStatus, RouterState

ENDPOINTS: dict[str, Endpoints | None] = {
    name: Endpoints(actor=name, pid=pid, address=f"127.0.0.1:{pid}", metrics_address=f"127.0.0.1:9{pid}")
    for name, pid in (("controller", 100), ("expert-0", 101), ("router", 102), ("router-1", 103))
} | {"router-2": None}
SEEN = ControllerStatus(
    term=1,
    generation=2,
    actors=(
        ActorState(actor="expert-0", address="a", incarnation="i", phase=ActorPhase.SERVING, experts=8, restarts=3),
    ),
    checkpoint="/models/tiny",
    routers=2,
    router_states=(
        RouterState(router="router", address="127.0.0.1:102", running=5, waiting=7),
        RouterState(router="router-1", address="127.0.0.1:103", running=1, leaving=True),
    ),
)


def lines(seen: ControllerStatus | None) -> dict[str, list[str]]:
    console = Console(width=160)
    with console.capture() as output:
        console.print(actors_table(ENDPOINTS, seen))
    return {line.split()[0]: line.split()[1:] for line in output.get().splitlines()}


def test_every_actor_has_a_line_and_routers_their_requests() -> None:
    assert lines(SEEN) == {
        "actor": ["phase", "experts", "restarts", "running", "waiting", "gRPC", "/metrics", "pid"],
        "controller": ["serving", "127.0.0.1:100", "127.0.0.1:9100", "100"],
        "expert-0": ["serving", "8", "3", "127.0.0.1:101", "127.0.0.1:9101", "101"],
        "router": ["serving", "5", "7", "127.0.0.1:102", "127.0.0.1:9102", "102"],
        "router-1": ["leaving", "1", "0", "127.0.0.1:103", "127.0.0.1:9103", "103"],
        "router-2": ["restarting"],
    }


def test_without_a_controller_it_shows_what_answers() -> None:
    assert lines(None)["router"] == ["serving", "127.0.0.1:102", "127.0.0.1:9102", "102"]
    assert lines(None)["router-2"] == ["restarting"]
