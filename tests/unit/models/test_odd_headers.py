"""Headers of safetensors files that are JSON and describe no tensor: one CheckpointError that names the file."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moecluster.errors import CheckpointError
from moecluster.models.checkpoint.files import FolderFiles
from moecluster.models.checkpoint.headers import SINGLE_FILE_NAME, read_headers

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(folder: Path, *entries: Mapping[str, Any]) -> None:
    header = json.dumps({f"t{i}": entry for i, entry in enumerate(entries)}).encode()
    (folder / SINGLE_FILE_NAME).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


@pytest.mark.parametrize(
    "changed",
    [
        {"data_offsets": [0, float("inf")]},
        {"data_offsets": [float("nan"), 8]},
        {"data_offsets": [8, 0], "shape": [-2]},
        {"data_offsets": [8, 0], "dtype": "NEW"},
        {"data_offsets": [0, 8], "shape": [-1, -2]},
        {"data_offsets": [0, 8, 8]},
        {"shape": [float("inf")]},
        {"shape": "2"},
        {"dtype": None, "data_offsets": [-8, 0]},
    ],
)
def test_an_entry_that_describes_no_tensor(tmp_path: Path, changed: dict[str, Any]) -> None:
    write(tmp_path, GOOD)
    assert read_headers(FolderFiles(tmp_path))["t0"].shape == (2,)
    write(tmp_path, GOOD | changed)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is torn"):
        read_headers(FolderFiles(tmp_path))


def test_offsets_are_integers(tmp_path: Path) -> None:
    for end in ("8", 8.0, True):
        write(tmp_path, GOOD, {"dtype": "NEW", "shape": [], "data_offsets": [0, end]})
        with pytest.raises(CheckpointError, match=r"model\.safetensors is torn"):
            read_headers(FolderFiles(tmp_path))
