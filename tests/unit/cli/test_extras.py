"""Without extras installed, every command works or names in one line the extra that it needs."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moecluster.cli.common import extras
from moecluster.cli.common.extras import EXTRAS, need
from moecluster.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]

# Hides packages as if they were not installed, imports every module, and runs every command with minimal arguments,
# without a cluster or input files.
SCRIPT = """
import contextlib, importlib, io, json, pkgutil, sys

hidden, lines = sys.argv[1].split(","), sys.argv[2:]

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import actors, moecluster
from moecluster.cli.app import main

failed = []
for package in (moecluster, actors):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=lambda name: None):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError:
            failed.append(found.name)

said = {}
for line in lines:
    sys.argv = ["moecluster", *line.split()]
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as ended:
            said[line] = (ended.code, err.getvalue())
print(json.dumps({"failed": failed, "said": said}))
"""
# The message of each if everything is installed.
COMMANDS = {
    **{
        f"{line} --name second": "no cluster second is up"
        for line in (
            *("status", "down", "scale 3", "drain expert-0", "place 0/0 expert-0", "plan", "operations", "explain x"),
            *("record x.jsonl", "update ."),
        )
    },
    **{
        line: '"nowhere": no such model directory, TOML file or preset'
        for line in ("up nowhere", "train nowhere", "generate nowhere x", "serve nowhere", "params nowhere")
    },
    "submit nowhere": 'submit: got "nowhere", expected a command of moecluster',
    "jobs --address nowhere": '--address: got "nowhere", expected http://HOST:PORT',
    "stop x/y": '"x/y" is no id of a job',
    "demo --set train.steps=x": "train.steps: got",
    "token --scope infer": "the cluster secret cannot be read",
    "certs tls --renew": "--renew: there is no certificate in",
    "gateway --model a=second": "no cluster second is up",
    "batch nowhere.jsonl out.jsonl": "nowhere.jsonl",
    "batch in.jsonl out.jsonl --cluster second": "no cluster second is up",
    "bench serve --base-url http://127.0.0.1:1": "cannot be reached",
    "replay nowhere.jsonl": "nowhere.jsonl",
    "simulate --top-k 9 --experts 8": "--top-k: got 9",
    "bench serve --plot x.png --base-url http://127.0.0.1:1": "cannot be reached",
    "simulate --plot x.png --trace in.jsonl": "is there already",
}
NEEDS = {
    "serve": {
        "serve nowhere": "moecluster serve",
        "gateway --model a=second": "moecluster gateway",
        "batch in.jsonl out.jsonl --cluster second": "moecluster batch --cluster",
    },
    "plots": {
        "bench serve --plot x.png --base-url http://127.0.0.1:1": "--plot",
        "simulate --plot x.png --trace in.jsonl": "--plot",
    },
    "certs": {
        "certs tls --renew": "moecluster certs",
    },
    "jobs": {
        "submit nowhere": "moecluster submit",
        "jobs --address nowhere": "moecluster jobs",
        "stop x/y": "moecluster stop",
    },
}
# Imported only after a check of what they need.
MODULES = {
    "serve": r"actors\.serve_app|moecluster\.gateway(\..+)?|moecluster\.cli\.(commands\.serve|common\.local_gateway)",
    "certs": r"moecluster\.cli\.(commands\.certs|common\.certificates)",
    "plots": r"moecluster\.http_client\.bench\.plot|moecluster\.training\.plots\..+|moecluster\.cli\.common\.plots",
    "jobs": r"moecluster\.cli\.(commands\.jobs|common\.working_dir)",
}


def outcome_without(packages: tuple[str, ...], folder: Path) -> Mapping[str, Any]:
    (folder / "in.jsonl").write_text(
        '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x"}}\n'
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ",".join(packages), *COMMANDS],
        cwd=folder,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(folder / "state"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("extra", EXTRAS)
def test_without_an_extra_every_command_works_or_names_it(extra: str, tmp_path: Path) -> None:
    found = outcome_without(EXTRAS[extra], tmp_path)
    assert found["failed"] and all(re.fullmatch(MODULES[extra], name) for name in found["failed"]), found["failed"]
    assert set(found["said"]) == set(COMMANDS)
    for line, expected in COMMANDS.items():
        code, output = found["said"][line]
        assert output.startswith("moecluster: ") and output.count("\n") == 1, (line, output)
        if line in NEEDS[extra]:
            assert output.startswith(f"moecluster: {NEEDS[extra][line]} needs {EXTRAS[extra][0]}"), output
            assert code == 2 and output.endswith(f": pip install 'moecluster[{extra}]'\n"), output
        else:
            assert expected in output and "pip install" not in output, (line, output)


def test_the_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(wanted: list[str]) -> list[str]:
        return [re.split(r"[^A-Za-z0-9_-]", line)[0] for line in wanted]

    always = names(project["dependencies"])
    extra_names = {
        extra: tuple(name for name in names(project["optional-dependencies"][extra]) if name not in always)
        for extra in EXTRAS
    }
    assert extra_names == EXTRAS
    assert any(wanted.startswith("httpx>=") for wanted in project["dependencies"])


def test_one_of_several_packages_is_enough_to_be_missed(monkeypatch) -> None:
    need("serve", "this")
    monkeypatch.setattr(extras, "is_installed", lambda package: package not in ("uvloop", "httptools"))
    with pytest.raises(ConfigError, match=r"^this needs uvloop and httptools: pip install 'moecluster\[serve\]'$"):
        need("serve", "this")
