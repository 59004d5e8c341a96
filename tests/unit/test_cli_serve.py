"""What `serve` and `front` are asked wrongly is said before anything listens for long or is started."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from actors import state
from actors.cli import main
from actors.state import UpCluster


@pytest.fixture
def complaint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """Runs the command line, which must fail as a user's mistake does, and returns its one line."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("actors.cli.signal.signal", lambda *_: None)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["moecluster", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code == 2 and said.err.count("\n") == 1, said
        return said.err

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("serve", "nothing-here"), "no such model directory, TOML file or preset"),
        (("serve", "demo", "--host", "0.0.0.0"), "there are no API keys"),
        (("serve", "demo", "--api-keys-file", "none"), "security.api_keys_file: none cannot be read"),
        (("serve", "demo", "--port", "70000"), "serve.port: got 70000"),
        (("serve", "demo", "--also", "second"), "expected NAME=CLUSTER"),
        (("serve", "demo", "--also", "b=second"), "no cluster second is up"),
        (("front",), "there is none to serve"),
        (("front", "--model", "a=first"), "no cluster first is up"),
        (("front", "--model", "a=first", "--model", "a=second"), "a name is given twice"),
        (("front", "--model", "a=first", "--set", "serve.prot=1"), "did you mean port"),
    ],
)
def test_mistakes_are_one_line(complaint, arguments, expected) -> None:
    assert expected in complaint(*arguments)
    assert not state.state_folder().exists()


def test_a_cluster_that_serves_something_else_is_not_served_under_a_wrong_name(complaint, tmp_path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    up = UpCluster(
        name="moecluster", ray_address="127.0.0.1:1", model="/models/other", router_addresses=("127.0.0.1:2",),
        controller_address="127.0.0.1:3", local_ray=None,
    )  # fmt: skip
    state.save(up)
    assert "serves /models/other, not" in complaint("serve", str(model))
