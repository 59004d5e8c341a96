"""Ends expert actors that exist and do not belong to the cluster: Ray started them again, or their end did not arrive.

Such an actor would hold its node for ever. A controller that has been replaced must not end its successor's actors, and
an answer that is old or incomplete must end nobody: so an actor is ended only after it was a stray for a while, in
answers that name actors of this cluster, while actors serve under this controller's term.
"""

import logging

from moecluster.controller.actors.interfaces import ActorSupervisor
from moecluster.controller.context import ControllerContext
from moecluster.errors import MoeClusterError

logger = logging.getLogger(__name__)

LOOKS = 4  # at least, before a stray is ended


class Strays:
    """Used by one thread at a time."""

    def __init__(self, context: ControllerContext, *, supervisor: ActorSupervisor, after_s: float) -> None:
        """after_s: how long an actor must have been a stray."""
        self._cluster_state = context.state
        self._clock = context.clock
        self._supervisor = supervisor
        self._after_s = after_s
        self._looked_s: float | None = None
        self._since_s: dict[str, float] = {}  # stray -> when it was first seen
        self._looks: dict[str, int] = {}  # stray -> how often it was seen

    def end(self) -> None:
        """Looks for strays, if it is time, and ends those that have been some for long enough."""
        now_s = self._clock()
        if self._looked_s is not None and now_s - self._looked_s < self._after_s / LOOKS:
            return
        self._looked_s = now_s
        members = set(self._cluster_state.actors)
        try:
            known = set(self._supervisor.known())
        except MoeClusterError:
            self._forget()
            return
        if not known & members or not self._cluster_state.up():
            self._forget()
            return
        strays = known - members
        self._since_s = {actor: self._since_s.get(actor, now_s) for actor in strays}
        self._looks = {actor: self._looks.get(actor, 0) + 1 for actor in strays}
        for actor in sorted(strays):
            if now_s - self._since_s[actor] >= self._after_s and self._looks[actor] >= LOOKS:
                logger.warning("%s does not belong to the cluster: ending it", actor)
                self._supervisor.remove(actor)

    def _forget(self) -> None:
        self._since_s, self._looks = {}, {}
