"""A secret that is easy to find is nowhere: not in logs, arguments, metrics, answers, records or errors."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

from actors.cluster_file import UpCluster
from moecluster.cli.commands.serve import ServedCluster
from moecluster.client import Client
from moecluster.config.sections import SecurityConfig
from moecluster.errors import MoeClusterError
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.gateway.server import ModelSource
from moecluster.metrics import Metrics
from moecluster.rpc.authentication import BearerCheck
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.rpc.credentials import SECRET_FILE_VARIABLE, ClusterCredentials, secret_path, write_secret
from moecluster.rpc.metrics_server import MetricsServer
from moecluster.rpc.scopes import Scope
from moecluster.rpc.tokens import make_token
from tests.support.clusters.guarded_servers import guarded_servers
from tests.support.clusters.running_gateway import running_gateway
from tests.support.fakes.fake_router import FakeRouter
from tests.support.waiting import WAIT_S

CANARY = "canary-" + "c" * 40
SECRET = ClusterCredentials(secret=CANARY)
TOKEN = make_token(SECRET, scopes=[Scope.READ], subject="ci", lifetime_s=3600)
API_KEY = "canary-key"
CANARIES = (CANARY, TOKEN, TOKEN.rpartition(".")[2], API_KEY)
OF_THE_CLIENT = ("httpx", "httpcore", "openai", "asyncio")  # whose loggers show what the test itself sends


def refuse_canaries(text: str) -> None:
    for canary in CANARIES:
        assert canary not in text, text[max(text.find(canary) - 200, 0) :][:400]


@pytest.fixture
def answers(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Everything that a cluster answers to right and wrong credentials, while it logs all that it has to say."""
    caplog.set_level(logging.DEBUG)
    for name in OF_THE_CLIENT:
        logging.getLogger(name).setLevel(logging.WARNING)
    heard: list[str] = []
    bearers = (CANARY, TOKEN, API_KEY, f"{CANARY}x", TOKEN[:-3])
    with ExitStack() as running:
        servers = running.enter_context(guarded_servers(SECRET))
        metrics = running.enter_context(closing(MetricsServer(Metrics(model="m"), credentials=SECRET)))
        router = running.enter_context(FakeRouter(credentials=SECRET))
        seeds = ClusterAddresses(routers=(router.address,), credentials=SECRET)
        source = ModelSource(name="model", cluster="moecluster", seeds=seeds)
        gateway = running.enter_context(running_gateway(source, keys=[API_KEY], security=SecurityConfig()))
        for credentials in (SECRET, ClusterCredentials(token=TOKEN), ClusterCredentials(secret=f"{CANARY}x")):
            for call in (
                lambda given: ControllerCalls(servers["controller"].address, credentials=given).scale(3),
                lambda given: ControllerCalls(servers["controller"].address, credentials=given).status(),
                lambda given: Client(servers["router"].address, credentials=given).generate("a").text(),
            ):
                with pytest.raises(MoeClusterError) as caught:
                    call(credentials)
                heard.append(f"{caught.value} {caught.value!r}")
            heard += [repr(credentials), str(vars(type(credentials)))]
        for bearer in bearers:
            headers = {"Authorization": f"Bearer {bearer}"}
            for url in (
                f"http://127.0.0.1:{metrics.port}/metrics",
                f"{gateway.url}/metrics",
                f"{gateway.url}/v1/models",
            ):
                answer = httpx.get(url, headers=headers, timeout=WAIT_S)
                heard.append(f"{answer.headers} {answer.text}")
        heard += [repr(each) for each in (seeds, source, gateway.server, gateway.server.gateway.access, servers)]
        yield heard


def test_no_answer_no_record_and_no_log_shows_it(answers, caplog, capfd) -> None:
    assert any("requires a token with the scope" in answer for answer in answers)
    assert any("moecluster_gateway_requests_total" in answer for answer in answers)
    refuse_canaries("\n".join(answers))
    refuse_canaries(caplog.text)
    printed = capfd.readouterr()
    refuse_canaries(printed.out + printed.err)
    refuse_canaries(repr(BearerCheck(SECRET)) + repr(BearerCheck(SECRET).caller(f"Bearer {TOKEN}")))


def test_no_argument_and_no_record_of_a_command_shows_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    write_secret(secret_path("moecluster"), SECRET)
    monkeypatch.setenv(SECRET_FILE_VARIABLE, str(secret_path("moecluster")))
    up = UpCluster(
        name="moecluster", ray_address="127.0.0.1:1", model="/m", router_addresses=("127.0.0.1:2",),
        controller_address="127.0.0.1:3", secret_file=str(secret_path("moecluster")), local_ray=None,
    )  # fmt: skip
    refuse_canaries(f"{up} {up.read_credentials()} {json.dumps(vars(up), default=str)}")
    refuse_canaries(" ".join(ServedCluster("moecluster", ("demo",), restarts=0, ending=lambda: True).command))
    wrong = ["-c", "from moecluster.cli.app import main; main()", "token", "--scope", "infer", "--subject", "no name"]
    done = subprocess.run([sys.executable, *wrong], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2 and "subject" in done.stderr
    refuse_canaries(done.stdout + done.stderr)
