"""Calls to named actors, with finite waits, and Ray's errors as ours."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util import list_named_actors

from actors.names import CONTROLLER, Endpoints
from moecluster.errors import DeadlineExceeded, MoeClusterError, Unavailable

RESOLVE_TIMEOUT_S = 5.0


def find_actor(name: str, namespace: str) -> "ActorHandle[Any]":
    """The handle of a named actor. Raises Unavailable if there is none."""
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError as exc:
        raise Unavailable(f"there is no actor {name} in the namespace {namespace}") from exc


def named_actors(namespace: str) -> list[str]:
    """The namespace's actors that are there, or being started again. Raises Unavailable if Ray does not say."""
    try:
        found = list_named_actors(all_namespaces=True)
    except (RayError, RuntimeError) as exc:
        raise Unavailable(f"Ray does not say which actors there are: {last_line(exc)}") from exc
    return sorted(actor["name"] for actor in found if actor["namespace"] == namespace)


def endpoints_of(names: Sequence[str], namespace: str, timeout_s: float) -> dict[str, Endpoints | None]:
    """Where actors are reached; None for one that does not answer within the timeout."""
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
    """The result of an actor's method. Raises a MoeClusterError: the method's own, Unavailable or DeadlineExceeded."""
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
    """What an exception of Ray says in the end, under its traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def first_line(error: BaseException) -> str:
    """What an exception says at first, of several lines that explain it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def controller_resolver(namespace: str) -> Callable[[], str]:
    """A function that says where the namespace's controller listens now, for ControllerClient."""

    def resolve() -> str:
        handle = find_actor(CONTROLLER, namespace)
        endpoints: Endpoints = call(handle.endpoints.remote(), RESOLVE_TIMEOUT_S, CONTROLLER)
        return endpoints.address

    return resolve
