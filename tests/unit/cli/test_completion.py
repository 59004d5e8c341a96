"""Completion through the protocol of each shell: what the command prints for a line that ends in TAB."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moecluster.config.load import SECTIONS, preset_names

ROOT = Path(__file__).resolve().parents[3]
# The console script, which also tells what it imported.
SCRIPT = """
import atexit, sys
atexit.register(lambda: print(*sorted({"torch", "ray", "numpy", "grpc"} & set(sys.modules)), file=sys.stderr))
from moecluster.cli.app import main
sys.argv = ["moecluster"]
main()
"""


def completed(shell: str, *words: str, **variables: str) -> list[str]:
    """Returns the lines for a command line; its last word is incomplete."""
    line = " ".join(("moecluster", *words))
    protocol = {
        "bash": {"COMP_WORDS": "\n".join(("moecluster", *words)), "COMP_CWORD": str(len(words))},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "_MOECLUSTER_COMPLETE": f"complete_{shell}"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment | protocol | variables, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr  # nothing heavy was imported
    return [line for line in done.stdout.splitlines() if line]


def test_commands_and_presets() -> None:
    assert completed("bash", "do") == ["down", "doctor"]
    assert completed("bash", "params", "") == list(preset_names())
    assert completed("bash", "up", "mi") == ["mixtral"]
    assert completed("bash", "up", "./mi") == []  # then bash offers files
    assert completed("zsh", "up", "./mi") == ["_files"]


def test_names_of_clusters(tmp_path: Path) -> None:
    (tmp_path / "moecluster").mkdir()
    for name in ("first.json", "second.json", "second.secret", "first.lock"):
        (tmp_path / "moecluster" / name).touch()
    assert completed("bash", "status", "--name", "", XDG_STATE_HOME=str(tmp_path)) == ["first", "second"]
    assert completed("bash", "batch", "--cluster", "s", XDG_STATE_HOME=str(tmp_path)) == ["second"]
    assert completed("bash", "status", "--name", "", XDG_STATE_HOME="relative") == []


def test_settings_by_key_then_by_value() -> None:
    found = completed("bash", "up", "--set", "cluster.num_")
    assert found == ["cluster.num_expert_actors=", "cluster.num_routers="]
    # Two that share a beginning, so that bash completes the key and adds no space.
    assert completed("bash", "up", "-s", "cluster.num_r") == ["cluster.num_routers=", "cluster.num_routers=1"]
    assert completed("zsh", "up", "--set", "train.durability=n")[0].startswith("_arguments")
    assert completed("bash", "up", "--set", "serve.allow_unknown_fields=t") == ["serve.allow_unknown_fields=true"]
    assert completed("bash", "up", "--set", "no.such") == []


def test_bash_which_splits_words_at_equals_gets_the_values_alone() -> None:
    # As bash splits: up --set security.ray_auth=<TAB>
    assert completed("bash", "up", "--set", "security.ray_auth", "=") == ["token", "disabled"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_setting_with_its_sentence(shell: str) -> None:
    found = "\n".join(completed(shell, "train", "--set", ""))
    for section in SECTIONS.values():
        assert f"{section.section}." in found
    if shell != "bash":
        assert "Optimizer steps." in found
    assert ("\t" in found) is (shell == "fish")


def test_bash_itself_completes_with_the_script_that_is_shown(tmp_path: Path) -> None:
    command = tmp_path / "moecluster"
    command.write_text(f"#!{sys.executable}\nfrom moecluster.cli.app import main\nmain()\n")
    command.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(
        ["moecluster"], env=environment | {"_MOECLUSTER_COMPLETE": "source_bash"}, capture_output=True, text=True
    )
    assert "_moecluster_completion" in shown.stdout, shown
    script = f"""{shown.stdout}
COMP_WORDS=(moecluster params sw); COMP_CWORD=2
_moecluster_completion moecluster
echo "${{COMPREPLY[@]}}"
complete -p moecluster
"""
    done = subprocess.run(["bash", "--norc", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "switch", done
    assert "-o default -F _moecluster_completion moecluster" in done.stdout
