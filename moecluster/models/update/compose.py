"""Composes a checkpoint from two: some experts, and optionally the trunk, from one; everything else from the other.

The result is an ordinary model directory: every tensor is in exactly one file. A shard is linked if all its tensors are
wanted; otherwise the wanted tensors are copied, byte for byte.
"""

import json
import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moecluster.errors import CheckpointError
from moecluster.models.checkpoint.checksums import PIECE_BYTES, RunningSums, SummedHeader, running_check
from moecluster.models.checkpoint.files import METADATA_NAME, FolderFiles
from moecluster.models.checkpoint.headers import INDEX_NAME, TensorInfo, read_headers
from moecluster.models.experts.source import ExpertSource
from moecluster.models.update.compatibility import check_same_shape
from moecluster.types import ExpertId

MAX_SHARD_BYTES = 4 * 2**30  # of newly written shards
SCALES = ("_scale_inv", "_blocks", "_scales")  # key suffixes of the parts of a quantized tensor

Stored = Mapping[str, TensorInfo]  # key -> stored tensor; the parts of a quantized tensor are separate


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A byte range of a stored tensor."""

    info: TensorInfo
    begin: int  # offset within the tensor
    num_bytes: int


def compose(
    served: str | Path, update: str | Path, out: str | Path, *, experts: Collection[ExpertId], keep_trunk: bool
) -> None:
    """Writes the directory `out`: the given experts from `update`, all others from `served`; trunk, tokenizer and
    config from `update`, or with keep_trunk from `served`.

    The directory appears only once it is complete. Raises CheckpointError if it already exists, if one of the two is
    torn, if their shapes or storage forms differ, or if writing fails.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out} is there already: name a directory that is not")
    check_same_shape(served, update)
    old, new = ExpertSource(served), ExpertSource(update)
    ours, theirs = read_headers(old.checkpoint.files), read_headers(new.checkpoint.files)
    _check_same_form(old, new, ours, theirs)
    aside = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.mkdir(parents=True)
        _copy_plain_files(old.checkpoint.path if keep_trunk else new.checkpoint.path, aside)
        pieces = _pieces(old, ours, theirs, experts, keep_trunk=keep_trunk)
        _write_weights(aside, pieces, ours, theirs, by_row=_keys_by_row(old, ours))
        _sync(aside)
        aside.rename(out)
        _sync(out.parent)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_weights(
    directory: Path, pieces: Mapping[str, list[_Piece]], ours: Stored, theirs: Stored, *, by_row: Collection[str]
) -> None:
    whole: dict[str, Path] = {}  # key -> its shard, for shards of which every tensor is wanted
    for stored in (ours, theirs):
        for file, keys in _by_file(stored).items():
            if all(pieces[key] == [_all_of(stored[key])] for key in keys):
                whole |= dict.fromkeys(keys, file)
    cut = _shards_to_write({key: pieces[key] for key in ours if key not in whole}, ours)
    linked = sorted(set(whole.values()))
    count = len(linked) + len(cut)
    weight_map: dict[str, str] = {}
    for number, file in enumerate(linked, start=1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        _link(file, directory / name)
        weight_map |= {key: name for key, of in whole.items() if of == file}
    for number, tensors in enumerate(cut, start=len(linked) + 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        _write_shard(directory / name, tensors, ours, by_row)
        weight_map |= dict.fromkeys(tensors, name)
    total_size = sum(info.num_bytes for info in ours.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _pieces(
    layout: ExpertSource, ours: Stored, theirs: Stored, experts: Collection[ExpertId], *, keep_trunk: bool
) -> dict[str, list[_Piece]]:
    """Returns key -> the byte ranges that make up its tensor, in order. layout: gives an expert's keys, the same in
    both checkpoints."""
    of_experts = set()
    pieces: dict[str, list[_Piece]] = {}
    for layer in layout.layers:
        for index in range(layer.num_experts):
            expert = ExpertId(layer=layer.layer, index=index)
            tensors = theirs if expert in experts else ours
            for key, row in layout.reads(expert):
                for stored in _stored_keys(ours, key):
                    of_experts.add(stored)
                    info = tensors[stored]
                    if row is None:
                        pieces[stored] = [_all_of(info)]
                    else:
                        row_bytes = info.num_bytes // info.shape[0]
                        rows = pieces.setdefault(stored, [])
                        _append(rows, _Piece(info=info, begin=row * row_bytes, num_bytes=row_bytes))
    trunk = ours if keep_trunk else theirs
    for key in ours.keys() - of_experts:
        pieces[key] = [_all_of(trunk[key])]
    return pieces


def _keys_by_row(layout: ExpertSource, ours: Stored) -> set[str]:
    """Returns the keys that hold the rows of all experts of a layer."""
    firsts = [ExpertId(layer=layer.layer, index=0) for layer in layout.layers]
    read = [pair for expert in firsts for pair in layout.reads(expert)]
    return {stored for key, row in read if row is not None for stored in _stored_keys(ours, key)}


def _stored_keys(stored: Stored, key: str) -> list[str]:
    return [name for name in (key, *(key + ending for ending in SCALES)) if name in stored]


def _append(pieces: list[_Piece], more: _Piece) -> None:
    """Appends a piece, or extends the last one if the two are adjacent in the file."""
    last = pieces[-1] if pieces else None
    if last is not None and last.info is more.info and last.begin + last.num_bytes == more.begin:
        pieces[-1] = _Piece(info=last.info, begin=last.begin, num_bytes=last.num_bytes + more.num_bytes)
    else:
        pieces.append(more)


def _all_of(info: TensorInfo) -> _Piece:
    return _Piece(info=info, begin=0, num_bytes=info.num_bytes)


def _by_file(tensors: Stored) -> dict[Path, list[str]]:
    found: dict[Path, list[str]] = {}
    for key, info in tensors.items():
        found.setdefault(info.file, []).append(key)
    return found


def _shards_to_write(pieces: Mapping[str, list[_Piece]], stored: Stored) -> list[dict[str, list[_Piece]]]:
    """Groups tensors into shards of bounded size, in the order of the source files."""
    shards: list[dict[str, list[_Piece]]] = []
    room_bytes = 0
    for key in sorted(pieces, key=lambda k: (stored[k].file, stored[k].begin)):
        num_bytes = stored[key].num_bytes
        if not shards or num_bytes > room_bytes:
            shards.append({})
            room_bytes = MAX_SHARD_BYTES
        shards[-1][key] = pieces[key]
        room_bytes -= num_bytes
    return shards


def _write_shard(path: Path, tensors: Mapping[str, list[_Piece]], infos: Stored, by_row: Collection[str]) -> None:
    entries: dict[str, dict[str, object]] = {}
    end = 0
    for key in tensors:
        begin, end = end, end + infos[key].num_bytes
        entries[key] = {"dtype": infos[key].dtype, "shape": list(infos[key].shape), "data_offsets": [begin, end]}
    header = SummedHeader(entries, by_row)
    with path.open("wb") as file:
        file.write(header.to_bytes())
        for key, pieces in tensors.items():
            sums = RunningSums(header.unit_bytes(key))
            for piece in pieces:
                _copy_bytes(piece, file, sums)
            header.set(key, sums.crcs)
        file.seek(0)
        file.write(header.to_bytes())
        file.flush()
        os.fsync(file.fileno())


def _copy_bytes(piece: _Piece, out: BinaryIO, sums: RunningSums) -> None:
    """Copies a piece, verifies its checksums where there are any, and adds to `sums`."""
    info = piece.info
    check = running_check(info.file, info.checksums, piece.begin)
    buffer = bytearray(min(PIECE_BYTES, piece.num_bytes))
    files = FolderFiles(info.file.parent)
    for at in range(0, piece.num_bytes, PIECE_BYTES):
        part = memoryview(buffer)[: piece.num_bytes - at]
        files.read_into(info.file.name, info.begin + piece.begin + at, part)
        if check is not None:
            check.add(part)
        sums.add(part)
        out.write(part)


def _link(file: Path, link: Path) -> None:
    """Makes a hard link, which outlives the source directory; across file systems, a symbolic link."""
    try:
        os.link(file.resolve(), link)
    except OSError:
        link.symlink_to(file.resolve())


def _copy_plain_files(source: Path, directory: Path) -> None:
    for file in sorted(source.iterdir()):
        if METADATA_NAME.fullmatch(file.name) and file.name != INDEX_NAME and file.is_file():
            shutil.copyfile(file, directory / file.name)


def _check_same_form(old: ExpertSource, new: ExpertSource, ours: Stored, theirs: Stored) -> None:
    for key in sorted(ours.keys() ^ theirs.keys()):
        has, lacks = (old, new) if key in ours else (new, old)
        raise CheckpointError(
            f"{has.checkpoint.path} has {key} and {lacks.checkpoint.path} has not: to be put together, both must be "
            "stored in the same form"
        )
    for key, info in sorted(ours.items()):
        if info.dtype != theirs[key].dtype:
            raise CheckpointError(
                f"{key} is {info.dtype} in {old.checkpoint.path} and {theirs[key].dtype} in {new.checkpoint.path}: to "
                "be put together, both must be stored in the same form"
            )


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
