"""moecluster update against a cluster over loopback: whole directories, and some experts of a directory."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from actors import cluster_file
from actors.cluster_file import UpCluster
from moecluster.cli.app import main
from moecluster.cli.commands import update
from moecluster.models.experts.source import ExpertSource
from moecluster.types import ExpertId
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.models.weight_versions import save_version

Run = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    return [save_version(root / name, seed) for seed, name in enumerate(("first", "second"))]


@pytest.fixture
def cluster(versions: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackCluster]:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "400")
    with LoopbackCluster(versions[0]) as running:
        # As `up` does, on a Ray that this test does not own.
        cluster_file.save(
            UpCluster(
                name="moecluster",
                ray_address="127.0.0.1:1",
                model=versions[0],
                router_addresses=(running.router_server.address,),
                controller_address=running.controller_server.address,
                local_ray=None,
            )
        )
        yield running
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(autouse=True)
def given(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directories given to the cluster; there is no Ray to send them through."""
    told: list[str] = []
    monkeypatch.setattr(update, "give_directory", lambda up, directory: told.append(directory))
    return told


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line; returns its exit code and output."""

    def run_command(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["moecluster", *arguments])
        capsys.readouterr()  # output of the cluster's own start
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        output = capsys.readouterr()
        return SimpleNamespace(code=code, out=output.out, err=output.err)

    return run_command


def test_a_whole_directory_is_waited_for_and_noted(
    run: Run, cluster: LoopbackCluster, versions: list[str], given: list[str]
) -> None:
    done = run("update", versions[1], "--id", "night")
    assert done.code == 0, done.err
    assert given == [versions[1]]
    assert done.out.startswith("night is done after ") and f"version 2: {versions[1]}; " in done.out
    noted = cluster_file.load("moecluster")
    assert noted is not None and noted.model == versions[1], "generate MODEL names what is served"
    again = run("update", versions[1])
    assert again.code == 2 and f"{versions[1]} is weight version 2 already" in again.err
    assert run("update", versions[1], "--id", "night").code == 0, "the same id asks for nothing new"


def test_some_experts_are_taken_out_of_a_directory(
    run: Run, cluster: LoopbackCluster, versions: list[str], tmp_path: Path, given: list[str]
) -> None:
    done = run("update", versions[1], "--experts", "0/1", "--experts", "1/*", "--keep-trunk")
    assert done.code == 0, done.err
    served = Path(cluster.controller.status().checkpoint)
    assert served == Path(f"{versions[0]}-v2") and f"{served}: 5 experts out of {versions[1]}" in done.out
    composed, old, new = ExpertSource(served), ExpertSource(versions[0]), ExpertSource(versions[1])
    for layer, index, source in ((0, 0, old), (0, 1, new), (1, 0, new), (1, 3, new)):
        expert = ExpertId(layer=layer, index=index)
        ours, theirs = composed.load(expert).state_dict(), source.load(expert).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    out = tmp_path / "mine"
    assert run("update", versions[1], "--experts", "0/0", "--out", str(out)).code == 0
    assert cluster.controller.status().checkpoint == str(out)
    assert given == [str(served), str(out)], "what was put together, not what it was taken from"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("nowhere",), "no model directory at nowhere"),
        (("SECOND", "--experts", "7/0"), '--experts: "7/0": layer 7 has no experts; MoE layers are 0, 1'),
        (("SECOND", "--experts", "0/9"), '--experts: "0/9": layer 0 has experts 0 to 3'),
        (("SECOND", "--experts", "all"), '--experts: got "all", expected layer/index such as 0/3, */1 or 2/*'),
        (("SECOND", "--out", "there"), "--out: nothing is put together without --experts or --keep-trunk"),
        (("SECOND", "--keep-trunk", "--out", "FIRST"), "is there already: name a directory that is not"),
        (("FIRST",), "is weight version 1 already; write new weights to another directory"),
    ],
)
def test_mistakes_are_named_in_one_line(
    run: Run, cluster: LoopbackCluster, versions: list[str], arguments: tuple[str, ...], line: str
) -> None:
    names = {"FIRST": versions[0], "SECOND": versions[1]}
    refused = run("update", *(names.get(word, word) for word in arguments))
    assert refused.code == 2 and line in refused.err and refused.err.count("\n") == 1, refused.err
    assert cluster.controller.status().weight_version == 1
