"""Which paths lie within the directories that a cluster was given."""

import os
from pathlib import Path

import pytest

from moecluster.errors import NotGiven, UserError
from moecluster.models.given_directories import MAX_SHOWN, check_given, is_within
from tests.support.clusters.given import any_directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """given, given-not (a look-alike) and secret, side by side, with links into and out of the given one."""
    for name in ("given/step-1", "given-not", "secret/model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "given/out").symlink_to(tmp_path / "secret")
    (tmp_path / "given/within").symlink_to("step-1")
    (tmp_path / "given/loop").symlink_to("loop")
    (tmp_path / "way-in").symlink_to(tmp_path / "given")
    (tmp_path / "given/step-1/weights").symlink_to(tmp_path / "secret/model")  # like the files in the hub's cache
    return tmp_path


@pytest.mark.parametrize(
    "path",
    [
        "given",
        "given/",
        "given/.",
        "given//step-1",
        "given/step-1",
        "given/step-1/../../given",
        "given/within",
        "given/step-9",  # does not exist: opening it will report that
        "given/step-9/deeper",
        "given/loop",
        "way-in",
        "way-in/step-1",
        "secret/../given",
    ],
)
def test_a_given_directory_and_what_lies_below_it(root: Path, path: str) -> None:
    assert is_within(f"{root}/{path}", [str(root / "given")])
    assert is_within(f"{root}/{path}", ["/nonexistent", str(root / "way-in")]), "given by another name"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "secret",
        "secret/model",
        "given-not",
        "givenx",
        "give",
        "given/..",
        "given/../secret/model",
        "given/step-1/../../secret",
        "given/step-9/../../secret",
        "given/out",
        "given/out/model",
        "given/within/../out/model",
        "given/within/../../secret",
        "given/loop/../../secret",
        "way-in/../secret",
        "given\0",
        "given/\0/x",
        "\0",
        "\ud800",
        "x" * 5000,
        "/".join(["x"] * 3000),
    ],
)
def test_all_else_is_outside(root: Path, path: str) -> None:
    assert not is_within(f"{root}/{path}", [str(root / "given")])


@pytest.mark.parametrize("path", ["", ".", "given", "./given", "given/step-1", "~", "file:///given", "\0"])
def test_a_relative_path_is_nobodys(root: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert not is_within(path, [str(root / "given"), "given", ".", ""])


def test_nothing_given_is_nothing_allowed_and_a_link_is_followed_when_it_is_asked_about(root: Path) -> None:
    assert not is_within(str(root / "given"), [])
    assert not is_within(str(root / "secret"), ["/\0", "secret", ""])
    given = root / "current"
    given.symlink_to(root / "given")
    assert not is_within(str(root / "secret"), [str(given)])
    given.unlink()
    given.symlink_to(root / "secret")
    assert is_within(str(given), [str(given)]) and not is_within(str(root / "given"), [str(given)])


@pytest.mark.parametrize("path", ["/home/me/private", "", "/a\nb\x1b[31m", "/a\0b", "/" + "x" * 4000])
def test_what_was_not_given_is_refused_in_one_line_that_names_it(path: str) -> None:
    check_given(path, any_directory)
    with pytest.raises(NotGiven) as refused:
        check_given(path, lambda _: False)
    line = str(refused.value)
    assert isinstance(refused.value, UserError) and line.isprintable() and len(line) < MAX_SHOWN + 150
    assert "the cluster was not given this directory" in line and (not path.isprintable() or path[:MAX_SHOWN] in line)
    assert os.path.isabs(line) or not path.isprintable() or not path
