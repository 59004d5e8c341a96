"""The Dockerfile: what it copies is let through, and the last stage has neither a compiler nor root."""

import re
from pathlib import Path

from tools.validate_manifests import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
STAGES = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
COMPILERS = ("gcc", "g++", "build-essential", "clang", "cmake", "python3-dev", "nvcc", "-devel")


def copied() -> set[str]:
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, flags=re.MULTILINE)
    return {source for line in lines for source in line.split()[:-1]}


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert copied() and all(Path(ROOT / source).exists() for source in copied())
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied()
    assert "*" in ignored


def test_the_last_stage_has_no_compiler_and_ends_as_a_user_without_rights() -> None:
    last = STAGES[-1]
    assert not any(compiler in last for compiler in COMPILERS)
    assert re.findall(r"^USER (\S+)$", last, flags=re.MULTILINE) == ["1000:1000"]


def test_bases_are_one_pinned_tag_that_a_digest_may_replace() -> None:
    assert all(stage.startswith("${PYTHON_IMAGE}") for stage in STAGES)
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
