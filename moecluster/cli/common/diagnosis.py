"""Diagnoses a running cluster, as far as possible from this host within a moment."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from actors.local_ray import LocalRay, RayProcess
from actors.names import Endpoints
from moecluster.types import ActorPhase, ControllerStatus

MAX_NAMED = 3  # actors listed by name


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Problems in words for a user, and notes on what could not be found out."""

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ended: bool = False  # nothing of the cluster serves any more, nor will it by itself

    @property
    def status(self) -> str:
        """The state in one word."""
        if self.ended:
            return "ended"
        return "degraded" if self.problems else "ready"


def of_local_ray(local: LocalRay, processes: Iterable[RayProcess], name: str) -> Diagnosis:
    """Diagnoses Ray's processes: missing ones that Ray cannot do without, and stopped ones."""
    found = list(processes)
    again = f"end what is left with moecluster down --name {name}, and start it anew with moecluster up"
    for part, what in (("raylet", "every actor with it"), ("gcs_server", "what finds and restarts actors with it")):
        if not any(process.part == part for process in found):
            return Diagnosis(problems=(f"Ray's {part} has ended, and {what}: {again}",), ended=True)
    stopped = [process for process in found if process.stopped]
    return Diagnosis(
        problems=tuple(
            f"{process.part} (process {process.pid}) is stopped, and does not answer: kill -CONT {process.pid}"
            for process in stopped
        )
    )


def of_actors(
    endpoints: Mapping[str, Endpoints | None], seen: ControllerStatus | None, controller_address: str
) -> Diagnosis:
    """Diagnoses the actors from the controller's status, or its silence, and from Ray's view."""
    problems = []
    if seen is None:
        problems.append(
            f"no controller answers at {controller_address}: it hangs, or is being started again; serving goes on "
            "meanwhile, and nothing that is lost comes back before"
        )
    else:
        problems += [
            f"{actor.actor} is {actor.phase}" + (f": {actor.problem}" if actor.problem else "")
            for actor in seen.actors
            if actor.phase is not ActorPhase.SERVING
        ]
        problems += [f"{router.router}: {router.problem}" for router in seen.router_states if router.problem]
        if seen.lost_experts:
            problems.append(
                f"{seen.lost_experts} experts have no serving replica: requests that need them wait or fail"
            )
    niced = sorted(name for name, at in endpoints.items() if at is not None and at.nice > 0)
    if niced:
        more = f" and {len(niced) - MAX_NAMED} more" if len(niced) > MAX_NAMED else ""
        problems.append(
            f"{', '.join(niced[:MAX_NAMED])}{more} give way to other programs of their hosts, as this Ray starts its "
            "workers with a nice value; start it with RAY_worker_niceness=0 in its environment"
        )
    return Diagnosis(problems=tuple(problems))
