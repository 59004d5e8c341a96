"""Checks the short way between two processes of this host: sealed memory and packet pipes, opened through /proc."""

import fcntl
import os
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from moecluster.cli.commands.doctor.finding import Check, Finding, ok, warning
from moecluster.config import Config
from moecluster.rpc.same_host.mailbox import Mailbox, MailboxUnavailable, PeerMailbox
from moecluster.rpc.same_host.peer_descriptor import opened_at_peer

SLOWER = "rows travel inside messages instead, which is slower"
TIMEOUT_S = 60.0
SEGMENT_BYTES = 2**20
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
# Another process with a pipe and memory of its own; it ends with its input.
PEER_SCRIPT = """
import os, sys
from moecluster.rpc.same_host.mailbox import Mailbox
mailbox = Mailbox()
memory = os.memfd_create("moecluster-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
print(os.getpid(), mailbox.fd, memory, flush=True)
sys.stdin.read()
"""


def sealed_memory(config: Config) -> Finding:
    """Whether memory can be made that a peer cannot shrink."""
    try:
        memory = os.memfd_create("moecluster-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as exc:
        return warning(f"memfd_create: {exc.strerror}; {SLOWER}", "allow it in the container's seccomp profile")
    try:
        os.posix_fallocate(memory, 0, SEGMENT_BYTES)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEALS)
    except OSError as exc:
        return warning(f"sealed memory: {exc.strerror}; {SLOWER}", "use a kernel of 3.17 or later, and free memory")
    finally:
        os.close(memory)
    return ok("memory can be sealed")


def packet_pipes(config: Config) -> Finding:
    """Whether pipes keep messages apart, and how many they hold."""
    try:
        mailbox = Mailbox()
    except MailboxUnavailable as exc:
        return warning(f"no pipe in packet mode: {exc}; {SLOWER}", "use a kernel of 3.4 or later, and free descriptors")
    try:
        capacity = fcntl.fcntl(mailbox.fd, fcntl.F_GETPIPE_SZ) // os.sysconf("SC_PAGE_SIZE")
    finally:
        mailbox.close()
    return ok(f"a pipe holds {capacity} messages")


def peers(config: Config) -> Finding:
    """Whether a process opens what another one of this user holds, as a router and an expert actor do."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with subprocess.Popen(
        [sys.executable, "-c", PEER_SCRIPT],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    ) as peer:  # fmt: skip
        assert peer.stdin is not None and peer.stdout is not None
        try:
            pid, pipe, memory = (int(number) for number in peer.stdout.readline().split())
            PeerMailbox(pid, pipe).close()
            with opened_at_peer(pid, memory, "memory", _is_regular) as path:
                os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except ValueError:
            return warning(f"a process with a pipe and memory did not start; {SLOWER}", "see the checks above")
        except (OSError, MailboxUnavailable) as exc:
            return warning(f"/proc/PID/fd of an own process: {exc}; {SLOWER}", _why())
        finally:
            peer.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                peer.wait(TIMEOUT_S)
            peer.kill()
    return ok("a process opens what another one of this user holds")


def _is_regular(found: os.stat_result, name: str) -> bool:
    return stat.S_ISREG(found.st_mode)


def _why() -> str:
    """Returns what on this host is known to forbid it."""
    suspects = []
    yama = Path("/proc/sys/kernel/yama/ptrace_scope")
    with suppress(OSError):
        if (scope := yama.read_text().strip()) != "0":
            suspects.append(f"{yama} is {scope}")
    with suppress(OSError):
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        suspects += [
            f"/proc is mounted with {mount[3]}" for mount in mounts if mount[1] == "/proc" and "hidepid" in mount[3]
        ]
    advice = "let processes of one user see each other: no security module and no separate PID namespace between them"
    return f"{'; '.join(suspects)}: {advice}" if suspects else advice


CHECKS = (
    Check(name="sealed memory", run=sealed_memory),
    Check(name="packet pipes", run=packet_pipes),
    Check(name="peers", run=peers),
)
