"""Three hosts with sshd on a network of their own, and `control`, a user's machine on it, from which to reach them.

The hosts share this machine's files, but for /root, /tmp/ray and /dev/shm. Their environments hold the packages of this
one's, as if these had been installed before: only moecluster itself is then installed, as on any host.
"""

import shutil
import subprocess
import sys
import sysconfig
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from tests.support.hosts.namespace import Namespace, lacking

NETWORK = "10.77.0"
CONTROL = f"{NETWORK}.1"
ADDRESSES = {"head": f"{NETWORK}.10", "w1": f"{NETWORK}.11", "w2": f"{NETWORK}.12"}
COMMANDS = ("sshd", "ssh", "ssh-keygen", "rsync")
SSHD = """
mkdir /run/sshd
/usr/sbin/sshd -e -f /dev/null -o ListenAddress={address} -o Port=22 -o HostKey=/root/.ssh/host_key -o PidFile=none \
    -o UsePAM=no -o PermitRootLogin=prohibit-password -o StrictModes=no -o MaxStartups=100 \
    -o 'Subsystem=sftp internal-sftp' -E /root/sshd.log
"""


def why_not() -> str:
    """Returns why there can be no such hosts here; empty if there can."""
    what = lacking(*COMMANDS)
    return f"hosts need {what}" if what else ""


class HostLab:
    """From __enter__ to __exit__: `control` and `hosts`."""

    def __init__(self, folder: Path) -> None:
        """folder: for the hosts' homes and logs."""
        self._folder = folder
        self._stack = ExitStack()
        self._relays: list[subprocess.Popen[str]] = []
        self.hosts: dict[str, Namespace] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.control = stack.enter_context(Namespace("control", self._folder / "control", script=_BRIDGE))
            keys = self.control.home / ".ssh"
            keys.mkdir(mode=0o700)
            _make_key(keys / "id_ed25519")
            for name, address in ADDRESSES.items():
                self.hosts[name] = stack.enter_context(self._host(name, address, keys / "id_ed25519.pub"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def cut_off(self, host: str) -> None:
        """Takes a host off the network: packets are lost in both directions, and no connection is reset."""
        self.control.run("ip", "link", "set", f"v-{host}", "down")

    def reconnect(self, host: str) -> None:
        """Puts a host back on the network."""
        self.control.run("ip", "link", "set", f"v-{host}", "up")

    def slow_down(self, *, delay_ms: int, loss_percent: float) -> str:
        """Delays what comes out of every host, and loses a part of it. Returns by what: the kernel's netem, or
        slow_link.py where the kernel has none."""
        netem = ("tc", "qdisc", "add", "dev", "eth0", "root", "netem")
        options = ("delay", f"{delay_ms}ms", "loss", f"{loss_percent}%", "limit", "100000")
        for number, (name, host) in enumerate(self.hosts.items()):
            if host.run(*netem, *options, check=False).returncode == 0:
                by = "netem"
                continue
            by = "slow_link"
            inner, late, outer = f"br-{name}", f"late-{name}", f"out-{name}"
            self.control.run("ip", "link", "add", inner, "type", "bridge")
            self.control.run("ip", "link", "set", inner, "up")
            relay = self.control.start(
                sys.executable, str(SLOW_LINK), late, outer, str(delay_ms), str(loss_percent), str(number)
            )
            self._relays.append(relay)
            assert relay.stdout is not None and relay.stdout.readline().strip() == "ready", relay.communicate()[0]
            for device, bridge in ((late, inner), (outer, "br0"), (f"v-{name}", inner)):
                self.control.run("ip", "link", "set", device, "txqueuelen", "10000", "master", bridge, "up")
        return by

    def speed_up(self) -> None:
        """Ends what slow_down did."""
        for name, host in self.hosts.items():
            if self._relays:
                self.control.run("ip", "link", "set", f"v-{name}", "master", "br0")
                self.control.run("ip", "link", "del", f"br-{name}")
            else:
                host.run("tc", "qdisc", "del", "dev", "eth0", "root")
        for relay in self._relays:
            self.control.end(relay)
        self._relays.clear()

    def kill(self, host: str) -> None:
        """Ends a host as a power failure does."""
        self.hosts.pop(host).close()

    def ssh(self, host: str, command: str, *, timeout_s: float = 60.0, check: bool = True) -> str:
        """Runs a command in a login shell of a host, and returns its output."""
        words = ("ssh", *SSH_OPTIONS, f"root@{ADDRESSES[host]}", f"bash --login -c {_quoted(command)}")
        return self.control.run(*words, timeout_s=timeout_s, check=check).stdout

    def _host(self, name: str, address: str, public_key: Path) -> Namespace:
        home = self._folder / name
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        _make_key(home / ".ssh" / "host_key")
        shutil.copy(public_key, home / ".ssh" / "authorized_keys")
        _make_environment(home / "moecluster" / "venv")
        host = Namespace(f"mc-{name}", home)
        try:
            link = ("ip", "link", "add", f"v-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
            # Only the network namespace: the other one's process is known by its number outside.
            subprocess.run(["nsenter", "--target", str(self.control.pid), "--net", "--", *link], check=True)
            self.control.run("ip", "link", "set", f"v-{name}", "master", "br0", "up")
            host.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
            host.run("bash", "-ec", SSHD.format(address=address), timeout_s=30.0)
        except BaseException:
            host.close()
            raise
        return host


SLOW_LINK = Path(__file__).with_name("slow_link.py")
SSH_OPTIONS = (
    *("-i", "/root/.ssh/id_ed25519", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
    *("-o", "LogLevel=ERROR", "-o", "ConnectTimeout=10"),
)
_BRIDGE = f"ip link add br0 type bridge; ip addr add {CONTROL}/24 dev br0; ip link set br0 up"


def _quoted(command: str) -> str:
    return "'" + command.replace("'", "'\\''") + "'"


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _make_environment(venv: Path) -> None:
    """Makes a virtual environment with the packages of this one, and their commands, but for moecluster's."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    packages = Path(sysconfig.get_path("purelib"))
    (venv / packages.relative_to(sys.prefix) / "of_the_tests.pth").write_text(f"{packages}\n")
    for name in ("ray", "pip"):
        script = Path(sys.prefix, "bin", name).read_text().splitlines()
        target = venv / "bin" / name
        target.write_text("\n".join(["#!/root/moecluster/venv/bin/python", *script[1:], ""]))
        target.chmod(0o755)
