"""Which cluster a command is for: one that `up` started here, by its name, or any, by its controller's address."""

from contextlib import suppress
from dataclasses import dataclass

from moecluster.addresses import split_host_port
from moecluster.config.sections import ClusterConfig
from moecluster.errors import ConfigError, MoeClusterError, TlsMismatch, Unauthenticated, Unavailable
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.rpc.credentials import SECRET_FILE_VARIABLE, ClusterCredentials, given_credentials, read_secret
from moecluster.rpc.tls.mismatch import mismatch_at
from moecluster.types import ControllerStatus


@dataclass(frozen=True, kw_only=True)
class ClusterChoice:
    """The cluster as a user named it."""

    name: str = ClusterConfig.name
    address: str = ""  # host:port of the controller; empty: the cluster is one that `up` recorded here under its name
    secret_file: str = ""  # for an address; empty: $MOECLUSTER_SECRET_FILE names it

    def __str__(self) -> str:
        return f"the cluster at {self.address}" if self.address else f"the cluster {self.name}"


def chosen(name: str | None, address: str, secret_file: str) -> ClusterChoice:
    """Returns the choice of a command's options; None, empty: not given. Raises ConfigError."""
    if not address:
        if secret_file:
            raise ConfigError(
                "--secret-file: goes with --address; the secret of a cluster that was started here is found by its name"
            )
        return ClusterChoice(name=name or ClusterConfig.name)
    if name is not None:
        raise ConfigError(f"--name: got {name} beside --address, expected one of the two")
    return at_address(address, secret_file, "--address")


def at_address(address: str, secret_file: str, option: str) -> ClusterChoice:
    """Returns the choice of a controller's address. Raises ConfigError, naming the option."""
    try:
        split_host_port(address)
    except ValueError as exc:
        raise ConfigError(f"{option}: got {exc}: the gRPC address of the cluster's controller") from exc
    return ClusterChoice(address=address, secret_file=secret_file)


class RemoteCluster:
    """A cluster that is known by its controller's address alone; neither its Ray nor its files are within reach."""

    def __init__(self, choice: ClusterChoice) -> None:
        """Raises ConfigError without readable credentials."""
        self.address = choice.address
        self.credentials = _credentials(choice)
        self._routers: tuple[str, ...] = ()

    def calls(self) -> ControllerCalls:
        """Returns a connection to the controller."""
        return ControllerCalls(self.address, credentials=self.credentials)

    def status(self) -> ControllerStatus:
        """Returns the cluster as its controller sees it. Raises a MoeClusterError; TlsMismatch if that is why it never
        answered."""
        with self.calls() as controller:
            try:
                seen = controller.status()
            except Unavailable as exc:
                known = self._routers or isinstance(exc, Unauthenticated | TlsMismatch)
                raise exc if known else mismatch_at(self.address, self.credentials) or exc from exc
        self._routers = routers_in(seen)
        return seen

    def router_addresses(self) -> tuple[str, ...]:
        """Returns host:port of every router that takes requests, by the controller's last answer."""
        with suppress(MoeClusterError):  # it is being restarted; most routers stay where they are
            self.status()
        return self._routers


def routers_in(status: ControllerStatus) -> tuple[str, ...]:
    """Returns host:port of every router that takes requests."""
    return tuple(state.address for state in status.router_states if state.address and not state.leaving)


def _credentials(choice: ClusterChoice) -> ClusterCredentials:
    if choice.secret_file:
        return read_secret(choice.secret_file)
    given = given_credentials()
    if given is None:
        raise ConfigError(
            f"{choice}: asks for its secret; give a copy of the file that moecluster up wrote, with --secret-file FILE "
            f"or in {SECRET_FILE_VARIABLE}"
        )
    return given
