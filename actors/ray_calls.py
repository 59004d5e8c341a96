"""Calls named actors, with finite timeouts and with Ray's errors translated to MoeClusterErrors."""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util import list_named_actors

from actors.names import CONTROLLER, Endpoints
from moecluster.errors import DeadlineExceeded, MoeClusterError, Unavailable

RESOLVE_TIMEOUT_S = 5.0
POLL_S = 0.1


def find_actor(name: str, namespace: str) -> "ActorHandle[Any]":
    """Returns the handle of a named actor. Raises Unavailable if there is none, or if Ray does not answer."""
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError as exc:
        raise Unavailable(f"there is no actor {name} in the namespace {namespace}") from exc
    except (RayError, RuntimeError) as exc:
        raise Unavailable(f"Ray does not say where {name} is: {last_line(exc)}") from exc


def named_actors(namespace: str) -> list[str]:
    """Returns the namespace's actors that are alive or being restarted. Raises Unavailable if Ray does not answer."""
    try:
        found = list_named_actors(all_namespaces=True)
    except (RayError, RuntimeError) as exc:
        raise Unavailable(f"Ray does not say which actors there are: {last_line(exc)}") from exc
    return sorted(actor["name"] for actor in found if actor["namespace"] == namespace)


def end_actors(namespace: str, timeout_s: float, *, spare: Collection[str] = ()) -> None:
    """Kills the namespace's actors for good, but for those to spare: the controller first, so that it does not restore
    what is being ended. Raises Unavailable if Ray does not answer."""
    deadline_s = time.monotonic() + timeout_s
    # In a loop: the controller may have requested another actor just before it died.
    while (names := set(named_actors(namespace)) - set(spare)) and time.monotonic() < deadline_s:
        for name in sorted(names, key=lambda name: name != CONTROLLER):
            with suppress(Unavailable):  # gone meanwhile
                ray.kill(find_actor(name, namespace), no_restart=True)
        time.sleep(POLL_S)


def endpoints_of(names: Sequence[str], namespace: str, timeout_s: float) -> dict[str, Endpoints | None]:
    """Returns the actors' endpoints; None for one that does not answer within the timeout."""
    asked: dict[str, Any] = {}
    for name in names:
        with suppress(Unavailable):  # gone meanwhile
            asked[name] = find_actor(name, namespace).endpoints.remote()
    if asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
    found: dict[str, Endpoints | None] = dict.fromkeys(names)
    for name, reference in asked.items():
        with suppress(MoeClusterError):
            found[name] = call(reference, 0.0, name)
    return found


def call(reference: Any, timeout_s: float, what: str) -> Any:
    """Returns an actor method's result. Raises a MoeClusterError: the method's own, Unavailable or DeadlineExceeded."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError as exc:
        raise DeadlineExceeded(f"{what}: no answer within {timeout_s:g} s") from exc
    except RayTaskError as exc:
        if isinstance(exc.cause, MoeClusterError):
            raise exc.cause from None
        raise MoeClusterError(f"{what}: {exc.cause}") from exc
    except RayActorError as exc:
        raise Unavailable(f"{what}: {last_line(exc)}") from exc
    except RayError as exc:
        raise MoeClusterError(f"{what}: {last_line(exc)}") from exc


def last_line(error: Exception) -> str:
    """Returns the last line of a Ray exception, below its traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def controller_resolver(namespace: str) -> Callable[[], str]:
    """Returns a function that finds the address of the namespace's controller, for ControllerClient."""

    def resolve() -> str:
        handle = find_actor(CONTROLLER, namespace)
        endpoints: Endpoints = call(handle.endpoints.remote(), RESOLVE_TIMEOUT_S, CONTROLLER)
        return endpoints.address

    return resolve
