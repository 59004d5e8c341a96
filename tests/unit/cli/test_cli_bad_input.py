"""Every user error detectable before a start: one line on standard error, the exit code, nothing left behind."""

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import LlamaConfig

from moecluster.cli.app import app, main
from moecluster.rpc.credentials import state_folder
from tests.support.clusters.fake_actors import save_tiny_model


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def complaint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command line, which must fail with a user error; returns its one line."""

    def run(*arguments: str, code: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["moecluster", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert ended.value.code == code, output
        assert output.err.startswith("moecluster: ") and output.err.count("\n") == 1, output.err
        assert "Traceback" not in output.err + output.out
        assert not state_folder().exists()
        return output.err

    return run


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.stepz=3", "train.stepz: unknown key; did you mean steps?"),
        ("trian.steps=3", "[trian]: unknown section"),
        ("train.steps=many", 'train.steps: got "many", expected an integer'),
        ("train.steps=0", "train.steps: got 0, expected at least 1"),
        ("steps", 'override: got "steps", expected section.key=value'),
        ("cluster.name=a/b", "cluster.name: got"),
        ("model.gate=mixtrall", "mixtral"),
        ("serve.max_routers=-1", "serve.max_routers: got -1, expected at least 0"),
    ],
)
@pytest.mark.parametrize("command", ["up", "train"])
def test_wrong_settings_name_themselves(complaint, command, setting, expected) -> None:
    options = ("--random-weights",) if command == "up" else ()
    assert expected in complaint(command, "demo", *options, "--set", setting)


@pytest.mark.parametrize(
    "arguments", [("up", "dmeo"), ("train", "dmeo"), ("params", "dmeo"), ("generate", "dmeo", "x")]
)
def test_an_unknown_preset_or_path_says_what_there_is(complaint, arguments) -> None:
    line = complaint(*arguments)
    assert '"dmeo": no such model directory, TOML file or preset' in line and "demo" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "N: expected a number of expert actors, or --routers with a number of routers"),
        (("3", "--routers", "2"), "or --routers with a number of routers instead"),
        (("0",), "N: got 0, expected at least 1 expert actor"),
        (("--routers", "0"), "--routers: got 0, expected at least 1 router"),
    ],
)
def test_a_size_is_one_number_of_one_thing(complaint, arguments, expected) -> None:
    assert expected in complaint("scale", *arguments)


def test_a_file_that_is_no_toml(complaint, tmp_path) -> None:
    (tmp_path / "my.toml").write_text("steps = = 3")
    assert "not valid TOML" in complaint("train", "my.toml")


def test_a_directory_that_is_no_model(complaint, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in complaint("up", str(tmp_path / "empty"))


def test_a_model_that_is_no_mixture_of_experts(complaint, tmp_path, model) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(model, dense)
    LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2).save_pretrained(dense)
    assert "llama" in complaint("up", str(dense))


def test_a_torn_checkpoint(complaint, tmp_path, model) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(model, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    assert "is torn" in complaint("up", str(torn))
    assert "is torn" in complaint("generate", str(torn), "x")


def test_an_index_that_names_a_missing_shard(complaint, tmp_path, model) -> None:
    part = tmp_path / "part"
    shutil.copytree(model, part)
    (part / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (part / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in complaint("up", str(part))


@pytest.mark.parametrize("content", [b"", b"\x00\x01\xff" * 4000])
def test_a_request_that_is_empty_or_binary(complaint, tmp_path, content) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    assert "text.txt" in complaint("train", "demo", "--data", str(tmp_path / "text.txt"))
    assert not (tmp_path / "runs").exists()


def test_a_request_that_is_not_there(complaint, tmp_path) -> None:
    assert "nowhere" in complaint("train", "demo", "--data", str(tmp_path / "nowhere"))


def test_generate_before_anything_is_trained(complaint) -> None:
    assert "nothing is trained in runs/moecluster yet" in complaint("generate", "demo", "def main(")


def test_generate_from_nothing(complaint, model) -> None:
    assert "PROMPT: got an empty prompt" in complaint("generate", str(model), "")


@pytest.mark.parametrize(
    "command",
    [
        "status",
        "down",
        "scale 3",
        "drain expert-0",
        "place 0/1 expert-0",
        "plan",
        "operations",
        "explain x",
        "record y",
    ],
)
def test_no_cluster_is_up(complaint, command) -> None:
    output = complaint(*command.split(), "--name", "second", code=3)
    assert "no cluster second is up; start one with moecluster up" in output


def test_params_of_a_preset_and_of_a_directory(monkeypatch, capsys, model) -> None:
    for target, total in (("mixtral", "3,381,120"), (str(model), "total parameters")):
        monkeypatch.setattr(sys, "argv", ["moecluster", "params", target])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        assert total in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(c.callback.__name__ for c in app.registered_commands if c.callback))
def test_help_has_an_example(monkeypatch, capsys, command) -> None:
    monkeypatch.setattr(sys, "argv", ["moecluster", command, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert f"Example: moecluster {command}" in capsys.readouterr().out
