"""Writers of files on a file system that is really full. Each case runs in a process of its own, which sees one.

python -m tests.support.exhaustion.full_disk CASE FOLDER, FOLDER being a small file system of this process alone.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moecluster.errors import MoeClusterError

FULL = "No space left on device"
COMMAND = (sys.executable, "-c", "from moecluster.cli.app import main; main()")
SIMULATED = ("--actors", "6", "--layers", "2", "--experts", "12", "--top-k", "2", "--slots", "3", "--no-growth")
PAGE_BYTES = 4096


@contextmanager
def full(folder: Path, *, but_bytes: int = 0) -> Iterator[None]:
    """Context: the folder's file system has no room, but for so many bytes."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(PAGE_BYTES))
        except OSError as exc:
            assert exc.strerror == FULL, exc
        file.truncate(file.tell() // PAGE_BYTES * PAGE_BYTES - but_bytes)
    try:
        yield
    finally:
        filler.unlink()


def contents(folder: Path) -> dict[str, str]:
    """Returns the digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "filler"
    }


def refuses(write: Callable[[], object]) -> str:
    """Returns the one line with which a write fails."""
    try:
        write()
    except (MoeClusterError, OSError) as exc:
        line = str(exc)
        assert FULL in line and "\n" not in line, line
        return line
    raise AssertionError("it was written, and there is no room")


def command(*words: object, code: int, into: Path | None = None, **environment: str) -> str:
    """Runs `moecluster`; returns its last line on standard error. into: gets its standard output."""
    with (into or Path(os.devnull)).open("wb") as out:
        done = subprocess.run(
            [*COMMAND, *map(str, words)],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "COLUMNS": "160", **environment},
        )  # fmt: skip
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    return lines[-1] if lines else ""


def training_checkpoint(folder: Path) -> None:
    import torch

    from moecluster.training.checkpoint_store import CheckpointStore
    from moecluster.training.tensor_file import write_tensors

    store = CheckpointStore(folder / "run")

    def write(step: int) -> object:
        def fill(at: Path) -> None:
            write_tensors(at / "x.safetensors", {"x": torch.ones(50_000)})

        return store.write(step, fill)

    write(1)
    before = contents(folder)
    with full(folder, but_bytes=100_000):
        assert "step 2 could not be written" in refuses(lambda: write(2))
        assert contents(folder) == before and store.steps() == [1]
    write(2)
    assert store.steps() == [1, 2]


def history(folder: Path) -> None:
    from moecluster.training.events import Evaluated, Started
    from moecluster.training.history import History

    written = History.open(folder)
    written.add(Started(step=0, steps=99, unigram_bits_per_byte=4.5, bytes_per_token=1.0))
    steps = 0

    def evaluated() -> None:
        nonlocal steps
        steps += 1
        written.add(Evaluated(step=steps, bits_per_byte=1.0, domains={"a": 1.0}))

    def until_full() -> None:
        while steps < 10_000:
            evaluated()

    with full(folder):
        assert "history.jsonl: the run's figures cannot be written" in refuses(until_full)
        seen = History.open(folder)
        assert seen.path.read_bytes().endswith(b"\n") and len(seen.evaluations) == steps - 1, "no line is torn"
        refuses(evaluated)
    evaluated()
    assert sorted(History.open(folder).evaluations) == list(range(1, steps + 1)), "no line is missing"


def torn_history(folder: Path) -> None:
    """A history whose last line a crash has torn is cut, without room for a copy of it."""
    from moecluster.training.events import Evaluated
    from moecluster.training.history import History

    written = History.open(folder)
    for step in range(200):
        written.add(Evaluated(step=step, bits_per_byte=1.0, domains={}))
    with written.path.open("a") as file:
        file.write('{"event": "Eval')
    with full(folder):
        assert len(History.open(folder).evaluations) == 200


def state_files(folder: Path) -> None:
    from dataclasses import replace

    from actors import cluster_file
    from actors.cluster_file import UpCluster
    from moecluster.rpc.credentials import ClusterCredentials, read_secret, secret_path, write_secret

    os.environ["XDG_STATE_HOME"] = str(folder)
    up = UpCluster(
        name="one", ray_address="h:1", model="/m", router_addresses=("h:2",), controller_address="h:3", local_ray=None
    )
    secret = ClusterCredentials.make(cluster="one")
    cluster_file.save(up)
    write_secret(secret_path("one"), secret)
    before = contents(folder)
    with full(folder):
        complaint = refuses(lambda: cluster_file.save(replace(up, model="/another")))
        assert "set XDG_STATE_HOME to a directory that you can write" in complaint
        another = ClusterCredentials.make(cluster="one")
        assert "the cluster's secret cannot be written" in refuses(lambda: write_secret(secret_path("one"), another))
        assert contents(folder) == before
        assert cluster_file.load("one") == up and read_secret(secret_path("one"), cluster="one") == secret


def batch(folder: Path) -> None:
    from tests.support.batch_requests import check_whole, write_requests
    from tests.support.fakes.fake_openai import FakeOpenAI, serving

    prompts = [f"prompt {number} {'x' * 200}" for number in range(60)]
    with tempfile.TemporaryDirectory() as elsewhere, serving(FakeOpenAI()) as gateway:
        source, out = write_requests(Path(elsewhere) / "in.jsonl", prompts), folder / "out.jsonl"
        words = ("batch", source, out, "--base-url", gateway.url, "--concurrency", 2)
        with full(folder, but_bytes=3 * PAGE_BYTES):
            complaint = command(*words, code=2)
            assert FULL in complaint and "out.jsonl.partial: cannot be written" in complaint, complaint
            assert "lines are kept, and the same command goes on behind them" in complaint
            assert not out.exists()
        sent = len(gateway.seen)
        command(*words, code=0)
        check_whole(out, prompts)
        assert 0 < sent < len(prompts) and len(gateway.seen) <= len(prompts) + 2 * 2, "what was kept is not sent again"


def batch_output(folder: Path) -> None:
    """Every line is in the journal, and the output finds no room beside it."""
    from tests.support.batch_requests import check_whole, write_requests
    from tests.support.fakes.fake_openai import FakeOpenAI, serving

    prompts = [f"prompt {number} {'x' * 300}" for number in range(60)]
    with tempfile.TemporaryDirectory() as elsewhere, serving(FakeOpenAI()) as gateway:
        source, out = write_requests(Path(elsewhere) / "in.jsonl", prompts), folder / "out.jsonl"
        words = ("batch", source, out, "--base-url", gateway.url)
        command(*words, code=0)
        journal_bytes = out.stat().st_size + 60 * 40
        out.unlink()
        with full(folder, but_bytes=-(-journal_bytes // PAGE_BYTES) * PAGE_BYTES + 2 * PAGE_BYTES):
            complaint = command(*words, code=2)
            assert FULL in complaint and "60 of 60 lines are kept" in complaint and not out.exists(), complaint
        command(*words, code=0)
        check_whole(out, prompts)
        assert len(gateway.seen) == 2 * len(prompts)


def reports_and_plots(folder: Path) -> None:
    report, picture = folder / "day.json", folder / "day.svg"
    for path in (report, picture):
        path.write_text("the one of yesterday")
    before = contents(folder)
    with full(folder):
        complaint = command("simulate", *SIMULATED, "--hours", "0.5", "--json", report, code=1)
        assert complaint == f"moecluster: {FULL}: {report}", complaint
        complaint = command("simulate", *SIMULATED, "--hours", "0.5", "--plot", picture, code=1)
        assert complaint == f"moecluster: {FULL}: {picture}", complaint
        assert contents(folder) == before


def traces(folder: Path) -> None:
    import numpy as np

    from moecluster.simulation.trace.format import TraceActor, TraceHeader, TraceLayer, TraceWindow
    from moecluster.simulation.trace.reader import open_trace
    from moecluster.simulation.trace.writer import TraceWriter

    day, recorded = folder / "day.jsonl", folder / "recorded.jsonl"
    header = TraceHeader(
        model="m",
        window_s=1.0,
        layers=(TraceLayer(layer=0, experts=2, expert_bytes=8),),
        actors=(TraceActor(name="a", slots=2),),
    )

    def record(first: int, last: int) -> None:
        with TraceWriter(recorded, header) as writer:
            for second in range(first, last):
                writer.add(TraceWindow(time_s=float(second), counts_LE=np.full((1, 2), 10**9 + second)))

    with full(folder, but_bytes=PAGE_BYTES):
        assert f"{recorded}: cannot be written" in refuses(lambda: record(1, 1000))
        whole = len(list(open_trace(recorded).windows()))
        assert whole > 10 and recorded.read_bytes().endswith(b"\n")
        complaint = command("simulate", *SIMULATED, "--hours", "2", "--trace", day, code=2)
        assert f"{day}: cannot be written: {FULL}" in complaint and not day.exists(), complaint
    record(whole + 1, 1000)
    assert [window.time_s for window in open_trace(recorded).windows()] == list(range(1, 1000))


def weight_update(folder: Path) -> None:
    from moecluster.models.update.compose import compose
    from moecluster.types import ExpertId
    from tests.support.models.families import make_model, save

    with tempfile.TemporaryDirectory() as elsewhere:
        old, new = Path(elsewhere) / "old", Path(elsewhere) / "new"
        save(make_model("mixtral", 0), old, "fused")
        save(make_model("mixtral", 1), new, "fused")

        def put_together() -> None:
            compose(old, new, folder / "out", experts=[ExpertId(layer=0, index=1)], keep_trunk=True)

        with full(folder, but_bytes=10 * PAGE_BYTES):
            assert f"{folder / 'out'} cannot be written" in refuses(put_together)
            assert not contents(folder) and not [each for each in folder.iterdir() if each.name != "filler"]
        put_together()


def streamed_checkpoint(folder: Path) -> None:
    """The configuration and tokenizer of a checkpoint of another host, in this host's folder for temporary files."""
    from moecluster.rpc.checkpoint.client import RemoteFiles, SourceAddress
    from moecluster.rpc.checkpoint.server import Announcements, serve_checkpoints
    from tests.support.models.families import make_model, save

    with tempfile.TemporaryDirectory() as elsewhere:
        save(make_model("mixtral", 0), Path(elsewhere), "fused")
        announcements = Announcements()
        announced = announcements.add("/nowhere", elsewhere)
        server = serve_checkpoints(announcements, credentials=None)
        tempfile.tempdir = str(folder)
        try:
            source = SourceAddress(id=announced.id, address=server.address)
            with full(folder):
                complaint = refuses(lambda: RemoteFiles("/nowhere", lambda: source))
                assert "of a checkpoint's files cannot be written" in complaint and "set TMPDIR" in complaint
                assert not contents(folder) and not list(folder.glob("moecluster-*"))
            RemoteFiles("/nowhere", lambda: source).close()
        finally:
            tempfile.tempdir = None
            server.stop(0.0)


def certificates(folder: Path) -> None:
    from moecluster.rpc.tls.material import TlsFiles, read_material

    tls = folder / "tls"
    command("certs", tls, code=0)
    before = contents(folder)
    # Room for one of the three files: none may be replaced.
    with full(folder, but_bytes=PAGE_BYTES):
        complaint = command("certs", tls, "--renew", code=2)
        assert f"cannot be written ({FULL})" in complaint and str(tls) in complaint, complaint
        assert contents(folder) == before and read_material(TlsFiles.in_folder(tls)).expires_s
        assert FULL in command("certs", folder / "second", code=2)
        assert contents(folder) == before, "nor is there half a CA"
    command("certs", tls, "--renew", code=0)
    assert contents(folder) != before and read_material(TlsFiles.in_folder(tls)).expires_s


def token(folder: Path) -> None:
    from moecluster.rpc.credentials import ClusterCredentials, secret_path, write_secret

    with tempfile.TemporaryDirectory() as elsewhere:
        os.environ["XDG_STATE_HOME"] = elsewhere
        write_secret(secret_path("moecluster"), ClusterCredentials.make())
        words = ("token", "--scope", "read", "--expires-in", "1h", "--subject", "ci")
        with full(folder):
            complaint = command(*words, code=1, into=folder / "ci.token")
            assert complaint == f"moecluster: the output cannot be written: {FULL}", complaint
        command(*words, code=0, into=folder / "ci.token")


def no_inodes(folder: Path) -> None:
    """A file system that can hold no further file, whatever its size."""
    from moecluster.rpc.checkpoint.locked_folder import HeldFolder

    tempfile.tempdir = str(folder)
    count = 0
    try:
        while True:
            (folder / f"file-{count}").touch()
            count += 1
    except OSError as exc:
        assert exc.strerror == FULL
    assert "a folder for the files of a checkpoint cannot be made" in refuses(HeldFolder)
    (folder / "file-0").unlink()
    assert "a folder for the files of a checkpoint cannot be made" in refuses(HeldFolder), "its lock is a file, too"
    assert not list(folder.glob("moecluster-*"))
    (folder / "file-1").unlink()
    HeldFolder().remove()


CASES: dict[str, Callable[[Path], None]] = {
    case.__name__: case
    for case in (
        training_checkpoint, history, torn_history, state_files, batch, batch_output, reports_and_plots, traces,
        weight_update, streamed_checkpoint, certificates, token, no_inodes,
    )
}  # fmt: skip


if __name__ == "__main__":
    CASES[sys.argv[1]](Path(sys.argv[2]))
