"""Searches one target for inputs that do what none may do, guided by coverage (atheris), until a time is over.

python -m tests.support.fuzz.guided TARGET SECONDS: exit code 0 if nothing was found; else the input is named.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["moecluster"], enable_loader_override=False):
    from moecluster.rpc.tensors import expect_read_only_views
    from tests.support.clusters.fake_actors import save_tiny_model
    from tests.support.clusters.loopback_cluster import LoopbackCluster
    from tests.support.fuzz.decoders import decoders
    from tests.support.fuzz.files import files
    from tests.support.fuzz.run import MAX_INPUT_BYTES, Target, run_one, watched
    from tests.support.fuzz.services import MAX_ACTORS, service_targets

RSS_LIMIT_MB = 4096  # libFuzzer ends with an error above it: what grows does so here


@contextmanager
def all_targets(folder: Path, *, services: bool) -> Iterator[Mapping[str, Target]]:
    """Context: every target by name; those of services only on demand, since they need a cluster."""
    with ExitStack() as stack:
        found = dict(stack.enter_context(decoders())) | dict(stack.enter_context(files(folder)))
        if services:
            checkpoint = save_tiny_model(folder / "model")
            cluster = stack.enter_context(LoopbackCluster(checkpoint, max_actors=MAX_ACTORS))
            found |= stack.enter_context(service_targets(cluster, checkpoint))
        yield found


def main() -> None:
    name, seconds = sys.argv[1], sys.argv[2]
    logging.disable(logging.CRITICAL)
    expect_read_only_views()
    with (
        tempfile.TemporaryDirectory() as folder,
        all_targets(Path(folder), services="Service/" in name) as targets,
        watched() as watch,
    ):
        os.chdir(folder)  # libFuzzer writes there what it found
        target = targets[name]
        options = [f"-max_total_time={seconds}", f"-max_len={MAX_INPUT_BYTES}", f"-rss_limit_mb={RSS_LIMIT_MB}"]
        # One input's time is limited by run_one, with the same timer as libFuzzer's.
        atheris.Setup(
            [sys.argv[0], *options, "-timeout=0", "-print_final_stats=1"],
            lambda data: run_one(target, data, watch),
        )
        atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    main()
