"""Ray gives an actor up for good if its constructor raises, even in a life that follows a death. Ours try again."""

import logging
import os
import time
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import ray

from moecluster.errors import MoeClusterError

logger = logging.getLogger(__name__)

PAUSE_S = 3.0  # before the next life
EXIT_CODE = 1  # as of a crash: Ray starts the actor again

ShellT = TypeVar("ShellT")
ArgumentsT = ParamSpec("ArgumentsT")


def begins_again(
    init: Callable[Concatenate[ShellT, ArgumentsT], None],
) -> Callable[Concatenate[ShellT, ArgumentsT], None]:
    """For the __init__ of a shell: in its first life it raises, and whoever starts the cluster hears why; in later
    ones the process ends, and Ray starts another one, until what it needs is there again."""

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
