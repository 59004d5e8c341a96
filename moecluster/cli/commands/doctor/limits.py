"""Checks the limits of this user's processes: open files, tasks, memory addresses, file sizes and CPU time."""

import os
import resource
from contextlib import suppress

import psutil

from moecluster.cli.commands.doctor.cgroup import Cgroups
from moecluster.cli.commands.doctor.finding import Check, Finding, ok, problem, warning
from moecluster.config import Config
from moecluster.rpc.server import MAX_CALLS

# Measured in idle clusters of the preset demo; a busy process opens and starts more.
FILES_PER_PROCESS = 256  # libraries, Ray's sockets, logs
FILES_PER_PEER = 8  # one router's stream to one expert actor: its socket, segment and mailboxes
RAY_TASKS = 200  # Ray's own processes and threads
TASKS_PER_ACTOR = 35
ADDRESSES_PER_PROCESS_BYTES = 16 * 2**30  # reserved, not used: torch's and gRPC's arenas
GATEWAY_FILES = 256  # what the gateway keeps for itself (moecluster/gateway/server.py: OWN_FILES)


def open_files(config: Config) -> Finding:
    """ulimit -n, against the streams between routers and expert actors and the gateway's connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return ok("no limit")
    peers = max(config.cluster.num_expert_actors, config.cluster.num_routers)
    needed = FILES_PER_PROCESS + FILES_PER_PEER * peers
    connections = config.serve.max_connections
    wanted = max(needed, GATEWAY_FILES + connections)
    how = f"ulimit -n {wanted}"
    if hard != resource.RLIM_INFINITY and hard < wanted:
        how = f"root must allow it first (/etc/security/limits.conf: nofile {wanted}), then ulimit -n {wanted}"
    if soft < needed:
        return problem(f"a process may open {soft} files, and an actor needs {needed}", how)
    if soft < wanted:
        room = max(soft - GATEWAY_FILES, soft // 2)
        return warning(f"with {soft} open files, the gateway takes {room} connections instead of {connections}", how)
    return ok(f"{soft} in a process")


def tasks(config: Config) -> Finding:
    """ulimit -u and the control group's limit, against the threads of all processes."""
    actors = config.cluster.num_expert_actors + config.cluster.num_routers + 1
    needed = RAY_TASKS + TASKS_PER_ACTOR * actors
    busy = needed + MAX_CALLS * actors
    room, why = _free_tasks()
    if room is None:
        return ok("no limit")
    advice = f"give room for {busy} processes and threads, with {why}"
    if room < needed:
        return problem(f"{room} more processes and threads may be started, and a cluster needs {needed}", advice)
    if room < busy:
        return warning(f"{room} more processes and threads may be started, and a busy cluster needs {busy}", advice)
    return ok(f"{room} more processes and threads may be started")


def sizes(config: Config) -> Finding:
    """Limits on addresses, files and CPU time, which a long run meets sooner or later."""
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if addresses != resource.RLIM_INFINITY:
        found = f"a process may reserve {addresses / 2**30:.1f} GiB of addresses"
        if addresses < ADDRESSES_PER_PROCESS_BYTES:
            return problem(f"{found}; torch and gRPC reserve far more than they use", "ulimit -v unlimited")
        return warning(found, "ulimit -v unlimited")
    for number, name, option in (
        (resource.RLIMIT_DATA, "data", "-d"),
        (resource.RLIMIT_FSIZE, "size of a file", "-f"),
        (resource.RLIMIT_CPU, "CPU time of a process", "-t"),
    ):
        limit, _ = resource.getrlimit(number)
        if limit != resource.RLIM_INFINITY:
            unit = "s" if number == resource.RLIMIT_CPU else "bytes"
            return warning(f"the {name} is limited to {limit} {unit}", f"ulimit {option} unlimited")
    return ok("no limit of addresses, data, files or CPU time")


def _free_tasks() -> tuple[int | None, str]:
    """Returns how many more tasks may be started, None for no limit, and what limits them."""
    found: list[tuple[int, str]] = []
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() != 0 and soft != resource.RLIM_INFINITY:  # the kernel exempts root
        found.append((max(soft - _tasks_of_user(), 0), "ulimit -u"))
    in_group = Cgroups().free_tasks()
    if in_group is not None:
        found.append((in_group, "the control group's pids.max (docker run --pids-limit)"))
    return min(found, default=(None, ""))


def _tasks_of_user() -> int:
    count = 0
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.uids().real == os.getuid():
                count += process.num_threads()
    return count


CHECKS = (
    Check(name="open files", run=open_files),
    Check(name="processes", run=tasks),
    Check(name="other limits", run=sizes),
)
