"""Training text: documents by domain, split into a training and a validation part."""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics

import torch

from moecluster.errors import DataError
from moecluster.training.text_files import EMPTY, Document, read_directory, read_file

STDLIB = "stdlib"
STDLIB_DOMAIN_BYTES = 2 * 2**20  # per source code domain of `stdlib`; files are added whole until this is reached
MAX_SKIPPED_SHARE = 0.1  # of a directory's bytes
VALIDATION_SHARE = 0.1
MAX_DOCUMENT_SHARE = 0.25  # of the validation text, so that one long table does not dominate the evaluation


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Text of one kind. No document is in both parts, unless one had to be cut to get a validation part."""

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    left_out: str = ""  # the files that were skipped, and why, in one line


def read_domains(data: str, *, max_skipped_share: float = MAX_SKIPPED_SHARE) -> tuple[Domain, ...]:
    """Returns the domains of a text file (one), a directory (one), or `stdlib` (three).

    max_skipped_share: the part of a directory's bytes that may be skipped as not UTF-8 text. Raises DataError.
    """
    if data == STDLIB:
        return tuple(_split(name, list(documents)) for name, documents in _stdlib_documents())
    path = Path(data)
    if os.path.isfile(path):
        document = read_file(path, path.name)
        if not isinstance(document, Document):
            wrong = "holds no text" if document == EMPTY else f"is {document}"
            raise DataError(f"{path} {wrong}: give a UTF-8 text file that is not empty")
        return (_split(path.name, [document]),)
    if not os.path.isdir(path):
        raise DataError(f'no such text: "{data}"; give a text file, a directory of text files, or {STDLIB}')
    documents, left_out = read_directory(path)
    if left_out.share > max_skipped_share:
        raise DataError(
            f"{path}: left out would be {left_out}; give UTF-8 text (iconv converts it), or allow more by "
            "train.max_skipped_share"
        )
    if not documents:
        also = f"; left out are {left_out}" if left_out.names else ""
        raise DataError(f"{path} holds no text: give UTF-8 text files that are not empty{also}")
    message = f"{path}: left out are {left_out}" if left_out.names else ""
    return (replace(_split(path.name or "text", documents), left_out=message),)


def _stdlib_documents() -> Iterator[tuple[str, Iterable[Document]]]:
    """Yields Python's standard library source, the English prose of its reference, and torch's C++ headers."""
    python = Path(sysconfig.get_path("stdlib"))
    headers = Path(torch.__file__).parent / "include"
    yield "python", _some_files(python, (f for f in python.glob("**/*.py") if _is_library(f.relative_to(python))))
    yield "prose", (Document(name=name, text=text) for name, text in topics.items())
    yield "c++", _some_files(headers, headers.glob("**/*.h"))


def _is_library(relative: Path) -> bool:
    """Returns False for installed packages, tests, and pydoc_data, whose prose is a domain of its own."""
    return not {"site-packages", "dist-packages", "test", "tests", "pydoc_data"} & set(relative.parts)


def _some_files(root: Path, files: Iterable[Path]) -> Iterator[Document]:
    """Yields a sample of the files, the same on every machine with the same files."""
    taken_bytes = 0
    for name, file in sorted(((f.relative_to(root).as_posix(), f) for f in files), key=lambda pair: _place(pair[0])):
        document = read_file(file, name)
        if isinstance(document, Document):
            yield document
            taken_bytes += len(document.text)
        if taken_bytes >= STDLIB_DOMAIN_BYTES:
            return


def _place(name: str) -> str:
    """Returns a sort key that shuffles documents by a hash of their names."""
    return hashlib.sha256(name.encode()).hexdigest()


def _split(name: str, documents: list[Document]) -> Domain:
    """Sets about a tenth of the text aside for validation, in whole documents of moderate length.

    If no document is short enough, the end of the longest one is the validation part.
    """
    ordered = sorted((d for d in documents if d.text.strip()), key=lambda d: _place(d.name))
    if not ordered:
        raise DataError(f"no text of the domain {name} is on this machine: give train.data a file or directory")
    total = sum(len(d.text) for d in ordered)
    validation: list[Document] = []
    held = 0
    for document in ordered:
        moderate = len(document.text) <= MAX_DOCUMENT_SHARE * VALIDATION_SHARE * total
        if moderate and held < VALIDATION_SHARE * total:
            validation.append(document)
            held += len(document.text)
    if not validation:  # a single document, or all are too long
        longest = max(ordered, key=lambda d: len(d.text))
        head, tail = _cut(longest.text)
        train = [d.text for d in ordered if d is not longest]
        return Domain(name=name, train=(*train, head), validation=(tail,))
    return Domain(
        name=name,
        train=tuple(d.text for d in ordered if d not in validation),
        validation=tuple(d.text for d in validation),
    )


def _cut(text: str) -> tuple[str, str]:
    """Cuts off the last tenth, at the end of a line if one is near."""
    at = int(len(text) * (1 - VALIDATION_SHARE))
    line_end = text.find("\n", at, at + (len(text) - at) // 2)
    at = line_end + 1 if line_end >= 0 else at
    return text[:at], text[at:]
