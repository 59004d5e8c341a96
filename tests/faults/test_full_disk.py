"""A really full disk: a file system of 1 MiB in its own mount namespace."""

import shutil
import subprocess
import sys

import pytest

WRITE_TWO_CHECKPOINTS = """
import os, sys, torch
from moecluster.errors import CheckpointError
from moecluster.training.checkpoint_store import CheckpointStore
from moecluster.training.tensor_file import write_tensors

store = CheckpointStore(sys.argv[1])
for step, numbers in ((1, 1_000), (2, 1_000_000)):
    try:
        store.write(step, lambda directory: write_tensors(directory / "x.safetensors", {"x": torch.ones(numbers)}))
    except CheckpointError as error:
        print(error)
print(os.listdir(store.root))
"""


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    command = f'mount -t tmpfs -o size=1m tmpfs "{tmp_path}" && "$@" "{tmp_path}"'
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", command, "sh", sys.executable, "-c", WRITE_TWO_CHECKPOINTS],
        capture_output=True,
        text=True,
        check=True,
    )
    complaint, left = done.stdout.splitlines()
    assert "step 2 could not be written" in complaint and "No space left on device" in complaint
    assert left == "['step-00000001']"
