"""Three hosts, of which only addresses, user and key are known: `ray up`, jobs from outside, a bad network, lost hosts,
`ray down`. The tests build on each other, in this order; the last writes what all have measured."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moecluster.config import Config
from moecluster.training.history import History
from moecluster.training.loop import TrainingLoop
from moecluster.training.setup import prepare_start, read_data, run_tokenizer
from tests.support.clusters.expert_cluster import ExpertCluster
from tests.support.hosts.figures import HostFigures
from tests.support.hosts.lab import ADDRESSES, HostLab, why_not
from tests.support.hosts.ray_up import RayOnHosts, wait_for
from tests.support.hosts.serving_job import CLUSTER, JOB, ServingJob, serve_on
from tests.support.training.training_runs import losses, make_config, write_text

DELAY_MS, LOSS_PERCENT = 200, 5.0
STEPS, EVERY_STEPS = 180, 30
TRAINING = "training"

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "can"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostLab]:
    with HostLab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="module")
def figures() -> HostFigures:
    return HostFigures()


@pytest.fixture(scope="module")
def hosts(lab: HostLab, figures: HostFigures) -> RayOnHosts:
    hosts = RayOnHosts(lab)
    with figures.timed("ray up until all nodes and the job server are there"):
        hosts.up()
    return hosts


@pytest.fixture(scope="module")
def serving(hosts: RayOnHosts, figures: HostFigures, tmp_path_factory: pytest.TempPathFactory) -> ServingJob:
    with figures.timed("serving job until the model is served"):
        return serve_on(hosts, tmp_path_factory.mktemp("model"))


def test_every_host_serves_what_only_the_head_has(hosts: RayOnHosts, serving: ServingJob, figures: HostFigures) -> None:
    assert hosts.nodes() == set(ADDRESSES.values())
    assert [name for name, host in hosts.lab.hosts.items() if (host.home / "tiny").exists()] == ["head"]
    status = json.loads(hosts.lab.ssh("head", "moecluster status --json"))
    assert status["actors"]["router"]["address"].startswith(f"{ADDRESSES['head']}:"), "training is where `up` ran"
    with serving.clients(2) as clients:
        wait_for(lambda: serving.experts().keys() == hosts.nodes(), "all hosts hold experts", timeout_s=60.0)
    assert clients.texts
    serving.check(clients.texts)
    figures.add_requests("good network", clients.texts)


def test_on_a_bad_network_no_request_fails_and_nothing_is_wrong(
    hosts: RayOnHosts, serving: ServingJob, figures: HostFigures
) -> None:
    hosts.lab.slow_down(delay_ms=DELAY_MS, loss_percent=LOSS_PERCENT)
    try:
        with serving.clients(4) as clients:
            pass  # each ends with the request that it has begun
    finally:
        hosts.lab.speed_up()
    assert len(clients.texts) >= 4
    serving.check(clients.texts)
    figures.add_requests(f"{DELAY_MS} ms and {LOSS_PERCENT:g} % loss", clients.texts)
    assert hosts.nodes() == set(ADDRESSES.values()), "a host was taken for lost"


def test_nothing_is_lost_with_a_host_killed_and_another_cut_off(
    hosts: RayOnHosts, serving: ServingJob, figures: HostFigures, tmp_path: Path
) -> None:
    """A training and a serving job, from outside; a host is killed, and one is cut off in the middle and comes back."""
    lab = hosts.lab
    work = lab.control.home / "work"
    work.mkdir()
    settings: dict[str, Any] = {"steps": STEPS, "checkpoint_every_steps": EVERY_STEPS, "participant_timeout_s": 2.0}
    config = make_config(write_text(work), tmp_path, **settings)
    (work / "run.toml").write_text(_toml(config))
    run = ("--set", "train.data=sentences.txt", "--set", "train.output_dir=runs/disturbed")
    with serving.clients(3) as clients:
        hosts.moecluster(
            *("submit", "--no-wait", "--id", TRAINING, "--working-dir", str(work)),
            *("train", "run.toml", *run, "--set", f"cluster.name={TRAINING}", *CLUSTER),
        )
        _wait_for_step(hosts, EVERY_STEPS)
        lab.kill("w2")
        _wait_for_step(hosts, 2 * EVERY_STEPS)
        lab.cut_off("w1")
        _wait_for_step(hosts, 4 * EVERY_STEPS)
        assert hosts.nodes() == {ADDRESSES["head"]}
        lab.reconnect("w1")
        wait_for(lambda: hosts.jobs()[TRAINING]["status"] != "RUNNING", "the run ends", timeout_s=400.0)
        with figures.timed("a host that was cut off is a node again, after the end of the run"):
            hosts.wait_for_nodes(2)
    assert hosts.jobs()[TRAINING]["status"] == "SUCCEEDED", hosts.log_of(TRAINING)
    serving.check(clients.texts)
    found = History.open(lab.hosts["head"].home / "runs" / "disturbed").steps
    assert {step: done.total_loss for step, done in found.items()} == _undisturbed(config)  # bit for bit
    assert "back to step" in hosts.log_of(TRAINING), "no state was lost"
    figures.add_requests("a host killed, another cut off", clients.texts)
    figures.add("a host killed, another cut off: training steps", STEPS, "steps")
    figures.add("a host killed, another cut off: losses that differ from the undisturbed run's", 0, "steps", target=0)


def test_ray_down_leaves_nothing_running(hosts: RayOnHosts, serving: ServingJob, figures: HostFigures) -> None:
    assert "has ended: stopped" in hosts.moecluster("stop", JOB).stdout
    assert "cluster moecluster is down" in hosts.log_of(JOB)
    with figures.timed("ray down: the command"):
        hosts.down()

    def left() -> list[str]:
        lines = [line for host in hosts.lab.hosts.values() for line in host.processes()]
        return [line for line in lines if not line.startswith(("sshd", "/usr/sbin/sshd"))]

    with figures.timed("after ray down, until the hosts run nothing but sshd"):
        wait_for(lambda: not left(), "the hosts run nothing but sshd", timeout_s=150.0)
    if sum("failed or wrong" in row.name for row in figures.rows) == 3:  # the tests before have passed
        figures.write()


def _wait_for_step(hosts: RayOnHosts, step: int) -> None:
    """Waits for the checkpoint of a step."""
    line = f"step {step}: checkpoint"

    def written() -> bool:
        log = hosts.log_of(TRAINING)
        assert "\nmoecluster: " not in log, log  # an error
        return line in log

    wait_for(written, line, timeout_s=400.0, every_s=0.2)


def _undisturbed(config: Config) -> dict[int, float]:
    """Returns step -> loss of the run in this process, with as many actors."""
    start, tokenizer = prepare_start(config), run_tokenizer(config)
    with ExpertCluster(start, num_actors=3, transport="in-process") as cluster:
        loop = TrainingLoop(config, cluster.remote, start=start, data=read_data(config, tokenizer), tokenizer=tokenizer)
        events = list(loop.run())
        loop.close()
    return losses(events)


def _toml(config: Config) -> str:
    """Returns a run's settings as a TOML file. JSON's numbers, texts, lists and booleans are TOML's."""
    tables: dict[str, dict[str, Any]] = {name: config.to_tables()[name] for name in ("model", "train")}
    left_out = ("data", "output_dir")  # elsewhere on the head
    return "\n".join(
        line
        for name, table in tables.items()
        for line in (
            f"[{name}]",
            *(f"{key} = {json.dumps(value)}" for key, value in table.items() if key not in left_out and value != {}),
        )
    )
