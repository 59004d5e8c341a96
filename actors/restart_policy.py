"""Restarts actors whose constructor fails after a crash: Ray never restarts an actor whose constructor raised."""

import logging
import os
import time
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import ray

from moecluster.errors import MoeClusterError

logger = logging.getLogger(__name__)

PAUSE_S = 3.0  # before the next incarnation
EXIT_CODE = 1  # counts as a crash: Ray restarts the actor

ShellT = TypeVar("ShellT")
ArgumentsT = ParamSpec("ArgumentsT")


def restart_on_init_failure(
    init: Callable[Concatenate[ShellT, ArgumentsT], None],
) -> Callable[Concatenate[ShellT, ArgumentsT], None]:
    """Decorates the __init__ of a shell. In the first incarnation it raises, so that whoever starts the cluster sees
    why; in later ones it exits the process instead, so that Ray restarts it until it succeeds."""

    @wraps(init)
    def begin(self: ShellT, /, *args: ArgumentsT.args, **kwargs: ArgumentsT.kwargs) -> None:
        try:
            init(self, *args, **kwargs)
        except Exception as exc:
            if not ray.get_runtime_context().was_current_actor_reconstructed:
                raise
            log = logger.warning if isinstance(exc, MoeClusterError) else logger.exception
            log("%s cannot begin, and tries again in %g s: %s", type(self).__name__, PAUSE_S, exc)
            time.sleep(PAUSE_S)
            os._exit(EXIT_CODE)

    return begin
