"""Reads a checkpoint of another host over loopback, under a path that does not exist locally."""

import gc
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import save_file

from actors.checkpoint_actor import CheckpointSource
from moecluster.errors import (
    CheckpointError,
    Exhausted,
    InvalidMessage,
    MoeClusterError,
    StaleRequest,
    Unavailable,
    UserError,
)
from moecluster.expert.service import ExpertService
from moecluster.models.checkpoint.files import LocalFiles, Seen
from moecluster.models.checkpoint.reader import SINGLE_FILE_NAME, Checkpoint
from moecluster.models.checkpoint.training_progress import TrainingState, write_training_state
from moecluster.models.experts.source import ExpertSource
from moecluster.proto import checkpoint_pb2
from moecluster.proto.checkpoint_pb2_grpc import CheckpointServiceStub
from moecluster.rpc.checkpoint import client
from moecluster.rpc.checkpoint import server as checkpoint_server
from moecluster.rpc.checkpoint.client import RemoteFiles, SourceAddress
from moecluster.rpc.checkpoint.server import Announcements, CheckpointServicer, serve_checkpoints
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.rpc.server import RunningServer, open_channel
from moecluster.rpc.status_codes import from_rpc_error
from moecluster.training.tensor_file import write_tensors
from moecluster.types import ExpertId, OptimizerSettings
from tests.support.clusters.given import any_directory
from tests.support.models.families import make_model, save
from tests.support.models.parity import LocalExperts, batch_for, load_routed

NAME = "/nowhere/on/this/host"
SECRET = "secret.key"


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "moecluster"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    make_model(request.param).save_pretrained(found, max_shard_size="40KB")
    (found / SECRET).write_text("not for others")
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("small")
    save(make_model("mixtral"), found, "per-expert")
    (found / SECRET).write_text("not for others")
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses small chunks and ranges, to have many, and short pauses."""
    monkeypatch.setattr(checkpoint_server, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(client, "RANGE_BYTES", 2500)
    monkeypatch.setattr(client, "PAUSE_S", 0.01)


@contextmanager
def announced(directory: Path) -> Iterator[tuple[RunningServer, SourceAddress]]:
    announcements = Announcements()
    server = serve_checkpoints(announcements, credentials=None)
    try:
        yield server, SourceAddress(address=server.address, id=announcements.add(NAME, directory).id)
    finally:
        server.stop(0.0)


class Counted(RemoteFiles):
    """Counts the bytes of weights read."""

    read_bytes = 0

    def read_into(self, name: str, begin: int, out: memoryview, seen: Seen | None = None) -> None:
        self.read_bytes += len(out)
        super().read_into(name, begin, out, seen)


def test_experts_and_trunk_are_those_of_the_directory(directory: Path) -> None:
    assert not Path(NAME).exists()
    with announced(directory) as (_, source), closing(Counted(NAME, lambda: source)) as files:
        checkpoint = Checkpoint.of(files)
        remote, here = ExpertSource(checkpoint), ExpertSource(directory)
        assert remote.layers == here.layers
        files.read_bytes, experts_bytes = 0, 0
        for layer in here.layers:
            for index in range(layer.num_experts):
                expert = ExpertId(layer=layer.layer, index=index)
                ours, expected = remote.load(expert).state_dict(), here.load(expert).state_dict()
                assert ours.keys() == expected.keys()
                assert all(torch.equal(ours[name], value) for name, value in expected.items())
                experts_bytes += here.expert_bytes(expert)
        assert files.read_bytes == experts_bytes

        files.read_bytes = 0
        backend = LocalExperts(directory)
        with torch.no_grad():
            ours = load_routed(checkpoint, backend)(batch_for()).logits
            assert torch.equal(ours, load_routed(directory, backend)(batch_for()).logits)
        everything = sum(info.num_bytes for info in checkpoint.tensors.values())
        assert files.read_bytes == everything - experts_bytes
        assert (files.metadata / "generation_config.json").read_bytes() == (
            directory / "generation_config.json"
        ).read_bytes()


def test_an_expert_actor_loads_what_its_node_does_not_see(small: Path) -> None:
    expert = ExpertId(layer=1, index=2)
    with announced(small) as (_, source):

        def open_elsewhere(name: str) -> Checkpoint:
            assert name == NAME
            return Checkpoint.of(RemoteFiles(name, lambda: source))

        with closing(ExpertService(is_given=any_directory, name="far", open_elsewhere=open_elsewhere)) as far:
            assert far.load(LoadRequest(term=1, experts=(expert,), checkpoint=NAME)) == ExpertSource(
                small
            ).expert_bytes(expert)
            with closing(ExpertService(is_given=any_directory, name="near")) as near:
                near.load(LoadRequest(term=1, experts=(expert,), checkpoint=str(small)))
                exported = [[t.value for t in s.export(experts=[expert], with_optimizer=False)] for s in (far, near)]
                assert all(torch.equal(a, b) for a, b in zip(*exported, strict=True))


def test_an_expert_actor_trains_on_from_what_its_node_does_not_see(small: Path, tmp_path: Path) -> None:
    expert = ExpertId(layer=1, index=2)
    directory = Path(shutil.copytree(small, tmp_path / "trained"))
    parameters = ExpertSource(small).load(expert).state_dict()
    moments = {
        f"{expert.index}/{state}/{name}": torch.full_like(value, 0.25)
        for name, value in parameters.items()
        for state in ("exp_avg", "exp_avg_sq")
    }
    steps = {f"{expert.index}/step/{name}": torch.tensor(7.0) for name in parameters}
    (directory / "training").mkdir()
    write_tensors(directory / "training" / "optimizer-layer-001.safetensors", moments | steps)
    write_training_state(directory, TrainingState(step=7, data_position=28, term=1, settings={}))
    (directory / "training" / SECRET).write_text("not for others")
    settings: dict[str, Any] = {"optimizer": OptimizerSettings(), "training_term": 1, "term": 1, "experts": (expert,)}
    with announced(directory) as (_, source):
        files = RemoteFiles(NAME, lambda: source)
        assert sorted(files.optimizer_files()) == ["training/optimizer-layer-001.safetensors"]
        assert not files.weights().keys() & files.optimizer_files().keys()
        far = ExpertService(is_given=any_directory, name="far", open_elsewhere=lambda _: Checkpoint.of(files))
        near = ExpertService(is_given=any_directory, name="near")
        with closing(files), closing(far), closing(near):
            far.load(LoadRequest(checkpoint=NAME, **settings))
            near.load(LoadRequest(checkpoint=str(directory), **settings))
            exported = [
                {tensor.name: tensor.value for tensor in service.export(experts=[expert], with_optimizer=True)}
                for service in (far, near)
            ]
    assert exported[0].keys() == exported[1].keys() and len(exported[0]) == 4 * len(parameters)
    assert all(torch.equal(value, exported[1][name]) for name, value in exported[0].items())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"id": ""}, StaleRequest),
        ({"id": "x" * 43}, StaleRequest),
        ({"id": "ä"}, StaleRequest),
        ({"name": SECRET}, InvalidMessage),
        ({"name": f"./{SINGLE_FILE_NAME}"}, InvalidMessage),
        ({"name": f"../small0/{SINGLE_FILE_NAME}"}, InvalidMessage),
        ({"name": "/etc/passwd"}, InvalidMessage),
        ({"name": ""}, InvalidMessage),
        ({"begin": 2**63}, InvalidMessage),
        ({"num_bytes": 2**63}, InvalidMessage),
        ({"begin": 10**9}, InvalidMessage),
    ],
)
def test_nothing_else_can_be_read(small: Path, change: dict[str, Any], error: type[MoeClusterError]) -> None:
    with announced(small) as (server, source), open_channel(server.address) as channel:
        wanted: dict[str, Any] = {"id": source.id, "name": SINGLE_FILE_NAME, "begin": 0, "num_bytes": 10}
        stub = CheckpointServiceStub(channel)
        whole = list(stub.Read(checkpoint_pb2.CheckpointReadRequest(**wanted), timeout=10.0))
        assert b"".join(chunk.content for chunk in whole) == (small / SINGLE_FILE_NAME).read_bytes()[:10]
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Read(checkpoint_pb2.CheckpointReadRequest(**(wanted | change)), timeout=10.0))
        assert isinstance(from_rpc_error(refused.value), error)
        names = {file.name for file in stub.Files(checkpoint_pb2.CheckpointFilesRequest(id=source.id)).files}
        assert names == {file.name for file in small.iterdir()} - {SECRET}


def test_a_file_that_has_changed_is_refused(small: Path, tmp_path: Path) -> None:
    for file in small.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with announced(tmp_path) as (_, source), closing(RemoteFiles(NAME, lambda: source)) as files:
        checkpoint = Checkpoint.of(files)
        save_file({"other": torch.zeros(3)}, tmp_path / SINGLE_FILE_NAME)
        with pytest.raises(UserError, match="has changed since it was announced"):
            checkpoint.read("lm_head.weight")
        (tmp_path / SINGLE_FILE_NAME).unlink()
        with pytest.raises(UserError, match="cannot be read"):
            checkpoint.read("lm_head.weight")


Chunk = checkpoint_pb2.CheckpointChunk


def cut_short(chunk: Chunk) -> Chunk:
    content = chunk.content[:-1]
    return Chunk(begin=chunk.begin, content=content, crc32=zlib.crc32(content))


def too_long(chunk: Chunk) -> Chunk:
    content = chunk.content * 4
    return Chunk(begin=chunk.begin, content=content, crc32=zlib.crc32(content))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda chunk: Chunk(begin=chunk.begin, content=chunk.content, crc32=chunk.crc32 ^ 1), "crc32: the checksum"),
        (lambda chunk: Chunk(begin=chunk.begin + 1, content=chunk.content, crc32=chunk.crc32), "begin: "),
        (lambda chunk: Chunk(begin=chunk.begin, crc32=0), "content: 0 bytes"),
        (cut_short, "begin: |content: "),
        (too_long, "content: .* are left"),
    ],
)
def test_chunks_that_are_not_what_was_asked_for(
    small: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Chunk], Chunk], complaint: str
) -> None:
    tampers, asked, read = threading.Event(), list[int](), CheckpointServicer.Read

    def tampered(servicer: CheckpointServicer, request: Any, context: Any) -> Iterator[Chunk]:
        chunks = read(servicer, request, context)
        if not tampers.is_set():
            return chunks
        asked.append(request.begin)
        return map(change, chunks)

    monkeypatch.setattr(CheckpointServicer, "Read", tampered)
    with announced(small) as (_, source), closing(RemoteFiles(NAME, lambda: source)) as files:
        checkpoint = Checkpoint.of(files)
        tampers.set()
        with pytest.raises(InvalidMessage, match=complaint):
            checkpoint.read("lm_head.weight")
    assert len(asked) == client.ATTEMPTS


@pytest.mark.parametrize(
    "names", [["../evil.json"], ["/tmp/evil.json"], [".hidden.json"], ["run.py"], ["a/b.safetensors"], ["x" * 300]]
)
def test_names_that_are_no_files_of_a_model_are_not_written(
    small: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    list_files(monkeypatch, {"config.json": 2, **dict.fromkeys(names, 1)})
    with announced(small) as (_, source), pytest.raises(InvalidMessage, match="is no name of a model's file"):
        RemoteFiles(NAME, lambda: source)


@pytest.mark.parametrize("sizes", [[2**30], [2**26] * 5])
def test_too_much_beside_the_weights_is_not_fetched(
    small: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    list_files(monkeypatch, {f"{i}.json": size for i, size in enumerate(sizes)})
    with announced(small) as (_, source), pytest.raises(InvalidMessage, match="bytes beside the weights"):
        RemoteFiles(NAME, lambda: source)


def list_files(monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]) -> None:
    """Sources list these files, by name."""
    reply = checkpoint_pb2.CheckpointFilesReply(
        files=[checkpoint_pb2.CheckpointFile(name=name, size_bytes=size) for name, size in sizes.items()]
    )
    monkeypatch.setattr(CheckpointServicer, "Files", lambda servicer, request, context: reply)


def test_reading_goes_on_at_a_source_that_was_started_again(small: Path) -> None:
    """The restarted source has another port and another id."""
    sources: list[SourceAddress] = []
    with announced(small) as (server, first):
        sources.append(first)
        files = RemoteFiles(NAME, lambda: sources[-1])
        checkpoint = Checkpoint.of(files)
        server.stop(0.0)
        with announced(small) as (_, second):
            sources.append(second)
            ours = checkpoint.read("lm_head.weight")
    files.close()
    assert first.id != second.id
    assert torch.equal(ours, Checkpoint.open(small).read("lm_head.weight"))


def test_a_source_that_is_gone_ends_the_reading(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CONNECT_TIMEOUT_S", 0.2)
    with announced(small) as (server, source), closing(RemoteFiles(NAME, lambda: source)) as files:
        checkpoint = Checkpoint.of(files)
        server.stop(0.0)
        with pytest.raises(Unavailable):
            checkpoint.read("lm_head.weight")


def test_a_source_at_which_many_read_is_waited_for(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_server, "MAX_READS", 1)
    expected = Checkpoint.open(small).read("lm_head.weight")
    with announced(small) as (_, source), ThreadPoolExecutor(8) as pool:

        def read(_: int) -> torch.Tensor:
            with closing(RemoteFiles(NAME, lambda: source)) as files:
                return Checkpoint.of(files).read("lm_head.weight")

        assert all(torch.equal(ours, expected) for ours in pool.map(read, range(8)))


def test_a_source_that_stays_busy_is_given_up_in_time(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BUSY_TIMEOUT_S", 0.3)
    with announced(small) as (_, source), closing(RemoteFiles(NAME, lambda: source)) as files:
        monkeypatch.setattr(client, "_fill", refuse)
        with pytest.raises(Exhausted, match="full"):
            Checkpoint.of(files)


def refuse(*args: Any) -> int:
    raise Exhausted("full")


def test_a_name_that_nobody_announced_is_not_waited_for(small: Path) -> None:
    def locate() -> SourceAddress:
        raise CheckpointError("nobody has announced it")

    with pytest.raises(CheckpointError, match="nobody has announced it"):
        RemoteFiles(NAME, locate)


def test_the_folder_goes_with_its_last_user(small: Path) -> None:
    with announced(small) as (_, source):
        files = RemoteFiles(NAME, lambda: source)
        folder = files.metadata
        assert (folder / "config.json").is_file()
        files.close()
        assert not folder.exists()
        with pytest.raises(Unavailable, match="was closed"):
            files.read_into(SINGLE_FILE_NAME, 0, memoryview(bytearray(8)))
        folder = RemoteFiles(NAME, lambda: source).metadata
        gc.collect()
        assert not folder.exists()


def test_only_the_newest_announcements_hold(small: Path, tmp_path: Path) -> None:
    announcements = Announcements()
    ids = [announcements.add(f"/model/{number}", small).id for number in range(checkpoint_server.MAX_ANNOUNCED + 1)]
    with pytest.raises(StaleRequest):
        announcements.with_id(ids[0])
    assert announcements.named("/model/0") is None
    assert announcements.with_id(ids[-1]).directory == small
    again = announcements.add("/model/1", small)
    assert again.id != ids[1]
    with pytest.raises(StaleRequest):
        announcements.with_id(ids[1])
    with pytest.raises(CheckpointError, match="no model directory"):
        announcements.add("/model/x", tmp_path / "none")


def test_a_source_that_was_started_again_gives_what_an_update_announced_to_its_former_incarnation(
    small: Path, directory: Path, tmp_path: Path
) -> None:
    credentials = ClusterCredentials.make()
    source = CheckpointSource({"cluster": {"host": "127.0.0.1"}}, credentials, str(small))
    found = source.locate(str(directory))
    assert found is not None and found == source.locate(str(directory))
    with closing(RemoteFiles(directory, lambda: found, credentials=credentials)) as files:
        assert files.weights() == LocalFiles(directory).weights()
    assert source.locate(str(tmp_path)) is None and source.locate(NAME) is None
