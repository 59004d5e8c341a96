"""Copies checkpoint tensors that training does not use, such as multi-token prediction layers, to new checkpoints."""

import logging
import os
import shutil
from pathlib import Path

import torch

from moecluster.hf.keys import unknown_keys
from moecluster.models.checkpoint.files import FolderFiles
from moecluster.models.checkpoint.headers import STORED, TensorInfo, read_header
from moecluster.models.checkpoint.reader import Checkpoint
from moecluster.models.checkpoint.training_progress import FOLDER
from moecluster.models.checkpoint.training_state import CARRIED_NAME
from moecluster.models.experts.layout import ExpertLayout
from moecluster.training.tensor_file import TensorFile

logger = logging.getLogger(__name__)


def carry_over(source: Path, directory: Path, layout: ExpertLayout) -> dict[str, int]:
    """Copies the tensors that belong neither to the trunk nor to the experts. Returns key -> bytes.

    Writes no file if there are none. Quantized tensors become bfloat16, because the written config has no quantization.
    """
    carried, out = source / CARRIED_NAME, directory / CARRIED_NAME
    if carried.is_file():  # the source is a checkpoint that training wrote
        try:
            os.link(carried, out)
        except OSError:
            shutil.copyfile(carried, out)
        header = read_header(FolderFiles(directory), CARRIED_NAME, out.stat().st_size)
        return {key: info.num_bytes for key, info in header.items()}
    if (source / FOLDER).is_dir():  # written by training, with nothing to carry over
        return {}
    return _copy(Checkpoint.open(source), out, layout)


def _copy(checkpoint: Checkpoint, out: Path, layout: ExpertLayout) -> dict[str, int]:
    infos = {key: checkpoint.info(key) for key in unknown_keys(layout.model, checkpoint.tensors)}
    dropped = [key for key, info in infos.items() if isinstance(info, TensorInfo) and info.dtype not in STORED]
    if dropped:
        logger.warning(
            "%s: %d tensors that training does not know are not in its checkpoints, as their format is unknown too; "
            "the first is %s", checkpoint.path, len(dropped), dropped[0],
        )  # fmt: skip
    kept = {key: info for key, info in infos.items() if key not in dropped}
    if not kept:
        return {}
    dtypes = {key: STORED[i.dtype] if isinstance(i, TensorInfo) else torch.bfloat16 for key, i in kept.items()}
    with TensorFile(out, {key: info.shape for key, info in kept.items()}, dtypes) as file:
        for key, info in kept.items():
            if isinstance(info, TensorInfo):
                file.write(key, checkpoint.read_as_is(info))
            else:
                file.write(key, checkpoint.read(key, dtype=dtypes[key]))
    return {key: _num_bytes(info.shape, dtypes[key]) for key, info in kept.items()}


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
