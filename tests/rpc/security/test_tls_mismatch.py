"""A client whose TLS does not fit the server's is told so at once; one whose server is being restarted waits for it."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from moecluster.addresses import ListenAddress
from moecluster.cli.commands.status import STATUS_S, status
from moecluster.cli.common import live_controller
from moecluster.cli.common.certificates import Authority
from moecluster.cli.common.cluster_choice import ClusterChoice, RemoteCluster
from moecluster.cli.common.live_controller import LiveController
from moecluster.errors import TlsMismatch, Unavailable
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.rpc.controller.server import serve_controller
from moecluster.rpc.credentials import TLS_DIR_VARIABLE, ClusterCredentials, write_secret
from moecluster.rpc.tls.mismatch import mismatch_at
from tests.support.certificates import write_certificates
from tests.support.fakes.fake_controller import PLACEMENT, FakeController
from tests.support.waiting import WAIT_S

SECRET = "k" * 43
OURS, THEIRS = Authority.make(), Authority.make()
# (the client's certificates, the server's) -> what is said
MISMATCHES = {
    ("", "ours"): "it requires TLS, and plain text was sent: give the folder of certificates",
    ("ours", ""): "it speaks plain text, and TLS was asked for",
    ("theirs", "ours"): "its certificate is not of the CA in the folder of certificates here",
    ("trusts ours, shows theirs", "ours"): "it does not take the certificate in the folder of certificates here",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("certificates")
    write_certificates(root / "ours", OURS)
    write_certificates(root / "theirs", THEIRS)
    write_certificates(root / "trusts ours, shows theirs", THEIRS, trusts=OURS.pem[0] + THEIRS.pem[0])
    return root


def credentials(folders: Path, name: str) -> ClusterCredentials:
    return ClusterCredentials(secret=SECRET, tls_dir=str(folders / name) if name else "")


@contextmanager
def serving(given: ClusterCredentials, port: int = 0) -> Iterator[str]:
    """Context: a controller's server; its address."""
    controller = FakeController()
    controller.publish(PLACEMENT)
    with closing(controller):
        server = serve_controller(controller, credentials=given, listen=ListenAddress(port=port))
        try:
            yield server.address
        finally:
            server.stop(0.0)


@pytest.fixture
def choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterChoice:
    """Of a command with the secret; a patience that no test waits for."""
    monkeypatch.setattr(live_controller, "PATIENCE_S", 100 * WAIT_S)
    file = tmp_path / "secret"
    write_secret(file, ClusterCredentials(secret=SECRET))
    return ClusterChoice(secret_file=str(file))


@pytest.mark.parametrize(("ours", "theirs"), list(MISMATCHES))
def test_a_command_at_an_address_ends_at_once_and_says_what_does_not_fit(
    folders: Path, choice: ClusterChoice, monkeypatch: pytest.MonkeyPatch, ours: str, theirs: str
) -> None:
    monkeypatch.setenv(TLS_DIR_VARIABLE, str(folders / ours) if ours else "")
    with serving(credentials(folders, theirs)) as address:
        there = ClusterChoice(address=address, secret_file=choice.secret_file)
        with pytest.raises(TlsMismatch, match=MISMATCHES[ours, theirs]) as caught, LiveController(there) as live:
            live.ask(lambda calls: calls.status())
        assert address in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(TlsMismatch, match=MISMATCHES[ours, theirs]):
            RemoteCluster(there).status()
        with pytest.raises(TlsMismatch, match=MISMATCHES[ours, theirs]):
            status(there, as_json=True, timeout_s=STATUS_S, console=Console())


@pytest.mark.parametrize("tls", ["", "ours"])
def test_nothing_is_found_where_both_sides_fit(folders: Path, tls: str) -> None:
    given = credentials(folders, tls)
    with serving(given) as address:
        assert mismatch_at(address, given) is None
    assert mismatch_at(address, given) is None, "and nothing where nobody listens"


@pytest.mark.parametrize("tls", ["", "ours"])
def test_a_server_that_is_being_restarted_is_waited_for(
    folders: Path, choice: ClusterChoice, monkeypatch: pytest.MonkeyPatch, tls: str
) -> None:
    """Until it is up, whatever listens there ends every connection."""
    monkeypatch.setenv(TLS_DIR_VARIABLE, str(folders / tls) if tls else "")
    ended, answers = threading.Event(), []
    with socket.create_server(("127.0.0.1", 0)) as going:
        port = going.getsockname()[1]

        def end_connections() -> None:
            for _ in range(6):
                going.accept()[0].close()
            ended.set()

        threading.Thread(target=end_connections, daemon=True).start()
        there = ClusterChoice(address=f"127.0.0.1:{port}", secret_file=choice.secret_file)

        def ask() -> None:
            with LiveController(there) as live:
                answers.append(live.ask(lambda calls: calls.status()))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        assert ended.wait(WAIT_S) and asking.is_alive()
    with serving(credentials(folders, tls), port=port):
        asking.join(WAIT_S)
        assert len(answers) == 1


def test_a_call_alone_tells_what_is_certain(folders: Path) -> None:
    for ours, theirs, kind in (("ours", "", TlsMismatch), ("theirs", "ours", TlsMismatch), ("", "ours", Unavailable)):
        with (
            serving(credentials(folders, theirs)) as address,
            ControllerCalls(address, credentials=credentials(folders, ours)) as calls,
            pytest.raises(Unavailable) as caught,
        ):
            calls.status()
        assert type(caught.value) is kind
