"""Calls to named actors, with finite waits, and Ray's errors as ours."""

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from actors.settings import CONTROLLER, Endpoints
from moecluster.errors import DeadlineExceeded, MoeClusterError, Unavailable
from moecluster.types import ActorAddress

POLL_S = 0.05
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


class RaySupervisor:
    """Expert actors as Ray keeps them: an ActorSupervisor for the controller."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def address_of(self, actor: str, timeout_s: float) -> ActorAddress | None:
        """Where the actor listens now; waits while Ray starts it again. None after the timeout."""
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                handle = find_actor(actor, self._namespace)
                address: ActorAddress = call(handle.address.remote(), left_s, actor)
                return address
            except MoeClusterError:
                time.sleep(min(POLL_S, left_s))
        return None

    def restart(self, actor: str) -> None:
        """Ends a process that hangs; Ray starts a new one."""
        try:
            ray.kill(find_actor(actor, self._namespace), no_restart=False)
        except (MoeClusterError, RayError):
            return  # gone already
