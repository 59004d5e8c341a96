"""Training over loopback gRPC: the same losses as in this process, bit for bit, with every transport."""

from pathlib import Path

import pytest

from moecluster.config import read_config
from moecluster.training.events import CheckpointWritten, StepDone
from moecluster.training.loop import TrainingLoop
from moecluster.training.setup import prepare_start, read_data, run_tokenizer
from tests.support.clusters.expert_cluster import ExpertCluster, Transport


def losses(root: Path, transport: Transport) -> list[float]:
    (root / "text.txt").write_text("\n".join(f"the {i}th line of {i * i} lines" for i in range(200)))
    config = read_config(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_heads": 2,
                "num_kv_heads": 1,
                "expert_inner_size": 32,
                "num_experts": 4,
                "initializer_range": 0.1,
            },
            "train": {
                "data": str(root / "text.txt"),
                "output_dir": str(root / transport),
                "steps": 6,
                "batch_size": 4,
                "micro_batches": 2,
                "sequence_length": 32,
                "warmup_steps": 2,
                "checkpoint_every_steps": 3,
                "eval_every_steps": 0,
                "eval_batches": 1,
            },
        }
    )
    start, tokenizer = prepare_start(config), run_tokenizer(config)
    with ExpertCluster(start, num_actors=2, transport=transport) as cluster:
        loop = TrainingLoop(config, cluster.remote, start=start, data=read_data(config, tokenizer), tokenizer=tokenizer)
        events = list(loop.run())
        loop.close()
    assert [event.step for event in events if isinstance(event, CheckpointWritten)] == [3, 6]
    return [event.loss for event in events if isinstance(event, StepDone)]


@pytest.mark.parametrize("transport", ["inline", "shm"])
def test_training_over_the_wire_equals_training_in_process(tmp_path, transport):
    found = losses(tmp_path, transport)
    assert len(found) == 6
    assert found == losses(tmp_path, "in-process")
