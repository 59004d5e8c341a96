"""Calls to named actors, with finite waits, and Ray's errors as ours."""

from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from actors.settings import CONTROLLER, Endpoints
from moecluster.errors import DeadlineExceeded, MoeClusterError, Unavailable

RESOLVE_TIMEOUT_S = 5.0


def find_actor(name: str, namespace: str) -> "ActorHandle[Any]":
    """The handle of a named actor. Raises Unavailable if there is none."""
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError as exc:
        raise Unavailable(f"there is no actor {name} in the namespace {namespace}") from exc


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


def controller_resolver(namespace: str) -> Callable[[], str]:
    """A function that says where the namespace's controller listens now, for ControllerClient."""

    def resolve() -> str:
        handle = find_actor(CONTROLLER, namespace)
        endpoints: Endpoints = call(handle.endpoints.remote(), RESOLVE_TIMEOUT_S, CONTROLLER)
        return endpoints.address

    return resolve
