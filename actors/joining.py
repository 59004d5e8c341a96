"""Joins a Ray cluster as a driver, and leaves it. Imports little besides Ray, which reads its authentication then."""

import logging
import os
import socket
from typing import Any

import grpc
import ray
from ray.exceptions import AuthenticationError

from actors.ray_calls import first_line
from actors.signals import signals_later
from moecluster.addresses import is_loopback, split_host_port
from moecluster.errors import ClusterNotFound, ResourceError
from moecluster.rpc.channels import is_connected_within

CONNECT_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 10.0


def connect(address: str) -> None:
    """Joins a running Ray cluster as a driver. Raises ClusterNotFound if there is none at host:port."""
    try:
        host, port = split_host_port(address)
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as exc:
        raise ClusterNotFound(
            f"no Ray cluster answers at {address}; give host:port of a running one (ray start prints it), "
            "or none to start a local one"
        ) from exc
    disconnect()  # harmless if not joined
    try:
        # Otherwise Ray replaces a loopback address by this host's network address.
        own: dict[str, Any] = {"_node_ip_address": host} if is_loopback(host) else {}
        with signals_later():  # threads started by gRPC inherit the signal mask, so signals stay with this thread
            _refuse_what_is_no_ray(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except ResourceError:
        raise
    except Exception as exc:  # Ray raises many kinds: for an address, a token, a version mismatch
        raise ResourceError(f"the Ray cluster at {address} cannot be joined: {_why_not_joined(exc)}") from exc


def _refuse_what_is_no_ray(address: str) -> None:
    """Raises ResourceError if no gRPC server answers; Ray would wait for minutes for a stopped or foreign process."""
    if os.environ.get("RAY_USE_TLS", "0") == "1":
        return
    with grpc.insecure_channel(address) as channel:
        if not is_connected_within(channel, ANSWER_TIMEOUT_S):
            raise ResourceError(
                f"what listens at {address} does not answer as a Ray does within {ANSWER_TIMEOUT_S:g} s: it is "
                "stopped or overloaded, or no Ray"
            )


def _why_not_joined(error: BaseException) -> str:
    """Returns one line. Ray reports a missing or wrong token only in the causes of its error."""
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
