"""Joining a Ray as a driver, and leaving it. Imports little beside Ray, which reads its authentication then."""

import logging
import os
import socket
from typing import Any

import grpc
import ray
from ray.exceptions import AuthenticationError

from actors.ray_calls import first_line
from actors.signals import signals_later
from moecluster.errors import ClusterNotFound, ResourceError

CONNECT_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 10.0


def connect(address: str) -> None:
    """Joins a running Ray cluster as a driver. Raises ClusterNotFound if there is none at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as exc:
        raise ClusterNotFound(
            f"no Ray cluster answers at {address}; give host:port of a running one (ray start prints it), "
            "or none to start a local one"
        ) from exc
    disconnect()  # fine if there is nothing to leave
    try:
        # Ray would take a loopback address for the one that this host has in its network.
        own: dict[str, Any] = {"_node_ip_address": host} if host == "127.0.0.1" else {}
        with signals_later():  # the threads that gRPC begins leave signals to this one, too
            _refuse_what_is_no_ray(host, int(port))
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except ResourceError:
        raise
    except Exception as exc:  # whatever kind Ray raises: an address, a token, a version that is not the Ray's
        raise ResourceError(f"the Ray cluster at {address} cannot be joined: {_why_not_joined(exc)}") from exc


def _refuse_what_is_no_ray(host: str, port: int) -> None:
    """Ray itself would wait for minutes for a process that is stopped, or that speaks something else."""
    if os.environ.get("RAY_USE_TLS", "0") == "1":
        return
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_TIMEOUT_S)
        except grpc.FutureTimeoutError as exc:
            raise ResourceError(
                f"what listens at {host}:{port} does not answer as a Ray does within {ANSWER_TIMEOUT_S:g} s: it is "
                "stopped or overloaded, or no Ray"
            ) from exc


def _why_not_joined(error: BaseException) -> str:
    """One line. Ray tells of a token that is missing or wrong only in what caused its error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, AuthenticationError):
            return (
                "it asks for a token, and that of this command is missing, unreadable or another; put the Ray's own "
                "token into RAY_AUTH_TOKEN, or the path of a file with it into RAY_AUTH_TOKEN_PATH, and set "
                "RAY_AUTH_MODE=token"
            )
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


def disconnect() -> None:
    """Leaves the Ray cluster; detached actors stay."""
    ray.shutdown()
