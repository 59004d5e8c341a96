"""Checks CPUs, memory, /dev/shm and the clock."""

import ctypes
import multiprocessing
import os
import time
from pathlib import Path

import psutil

from actors.local_ray import OBJECT_STORE_BYTES
from moecluster.cli.commands.doctor.cgroup import Cgroups
from moecluster.cli.commands.doctor.finding import Check, Finding, ok, problem, warning
from moecluster.cli.common.formatting import shown_bytes
from moecluster.config import Config
from moecluster.models.checkpoint.files import LocalFiles

RAY_BYTES = 500 * 2**20  # measured: Ray's processes on two cores
PROCESS_BYTES = 280 * 2**20  # measured: an actor with torch, before it holds weights
RAY_KILLS_AT = 0.95  # part of the memory in use: above it, Ray kills workers
MAX_TICK_S = 1e-3
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
NEVER_OVERCOMMIT = "2"
TIME_ERROR = 5  # state that adjtimex(2) returns for a clock that nothing disciplines
TIMEX_BYTES = 1024  # more than struct timex has on any machine


def cpus(config: Config) -> Finding:
    """The CPUs that Ray finds, against those that the actors reserve and those that may be used."""
    quota = Cgroups().cpus()
    of_ray = min(multiprocessing.cpu_count(), int(quota) if quota and quota >= 1 else multiprocessing.cpu_count())
    usable = min(float(len(os.sched_getaffinity(0))), quota or float("inf"))
    cluster = config.cluster
    reserved = cluster.num_expert_actors * cluster.cpus_per_expert_actor + cluster.num_routers * cluster.cpus_per_router
    found = f"{usable:g} CPUs may be used"
    if not cluster.address and reserved > of_ray + 1e-6:
        return problem(
            f"Ray finds {of_ray} CPUs, and the actors reserve {reserved:g}",
            "lower cluster.num_expert_actors, cluster.num_routers or the CPUs per actor",
        )
    if usable < 1:
        return warning(found, "give the control group more CPU time: heartbeats may be late")
    if usable < of_ray:
        return warning(
            f"{found}, and Ray counts {of_ray}", f"start Ray yourself with --num-cpus={int(usable)} if it is too busy"
        )
    return ok(f"{found}; the actors reserve {reserved:g}")


def memory(config: Config) -> Finding:
    """Free memory, against what processes, segments and a checkpoint's weights take."""
    machine = psutil.virtual_memory()
    free = min(machine.available, _or_infinite(Cgroups().free_memory_bytes()))
    cluster = config.cluster
    processes = cluster.num_expert_actors + cluster.num_routers + 1
    needed = (0 if cluster.address else RAY_BYTES) + processes * PROCESS_BYTES
    weights = sum(LocalFiles(config.model.path).weights().values()) if config.model.path else 0
    found = f"{shown_bytes(free)} of {shown_bytes(machine.total)} are free"
    if free < needed:
        return problem(
            f"{found}, and {processes} actors need {shown_bytes(needed)} without weights",
            "end other programs, raise the control group's limit, or start fewer actors",
        )
    if weights and not cluster.address and free < needed + weights:
        return problem(
            f"{found}, and {processes} actors with weights of {shown_bytes(weights)} need more",
            "use a machine with more memory, or several (cluster.address)",
        )
    if 1 - machine.available / machine.total > RAY_KILLS_AT:
        return problem(
            f"{found}, and Ray kills actors above {RAY_KILLS_AT:.0%} in use",
            "end other programs, or set RAY_memory_usage_threshold",
        )
    if OVERCOMMIT.exists() and OVERCOMMIT.read_text().strip() == NEVER_OVERCOMMIT:
        return warning(
            "vm.overcommit_memory is 2: the kernel counts what processes reserve", "sysctl vm.overcommit_memory=0"
        )
    segments = 0
    if config.router.transport == "auto":
        segments = 2 * cluster.num_routers * cluster.num_expert_actors * config.router.shared_memory_bytes
    if free < needed + weights + segments:
        return warning(
            f"{found}; the shared memory of routers and actors takes {shown_bytes(segments)} of it",
            "lower router.shared_memory_bytes: without room, rows travel inside messages, which is slower",
        )
    return ok(found)


def shared_memory(config: Config) -> Finding:
    """/dev/shm, where Ray keeps call arguments. Rows travel in memory of their own, which it does not limit."""
    folder = Path("/dev/shm")
    try:
        status = os.statvfs(folder)
        writable = os.access(folder, os.W_OK)
    except OSError as exc:
        return problem(f"{folder}: {exc.strerror}", f"mount it: mount -t tmpfs -o size=1g shm {folder}")
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    found = f"{shown_bytes(free)} of {shown_bytes(total)} are free in {folder}"
    if not writable:
        return problem(f"{folder} cannot be written", f"chmod 1777 {folder}")
    if not config.cluster.address and free < OBJECT_STORE_BYTES:
        return warning(
            f"{found}; Ray wants {shown_bytes(OBJECT_STORE_BYTES)}, and else uses its folder for temporary files",
            "remove what is left there, or make it larger (docker run --shm-size=1g)",
        )
    return ok(found)


def clock(config: Config) -> Finding:
    """The resolution of the monotonic clock, and whether anything disciplines the time of day."""
    tick_s = time.get_clock_info("monotonic").resolution
    if tick_s > MAX_TICK_S:
        return warning(f"the clock ticks every {1e3 * tick_s:g} ms", "choose another clock source of the kernel")
    synchronized = is_synchronized()
    if synchronized is None:
        return ok(f"ticks every {1e9 * tick_s:g} ns; whether it is synchronized is unknown")
    if not synchronized and config.cluster.address:
        return warning(
            "the time of day is not synchronized", "run chrony or systemd-timesyncd on every host of the cluster"
        )
    state = "synchronized" if synchronized else "not synchronized, which one host does without"
    return ok(f"ticks every {1e9 * tick_s:g} ns, {state}")


def is_synchronized() -> bool | None:
    """Returns whether the kernel's clock is disciplined (NTP, PTP, the hypervisor); None if it does not say."""
    read = getattr(ctypes.CDLL(None), "adjtimex", None)
    if read is None:
        return None
    state: int = read(ctypes.create_string_buffer(TIMEX_BYTES))  # modes = 0: changes nothing
    return None if state < 0 else state != TIME_ERROR


def _or_infinite(room: int | None) -> float:
    return float("inf") if room is None else room


CHECKS = (
    Check(name="CPUs", run=cpus),
    Check(name="memory", run=memory),
    Check(name="/dev/shm", run=shared_memory),
    Check(name="clock", run=clock),
)
