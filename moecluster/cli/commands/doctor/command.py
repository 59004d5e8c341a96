"""Runs all checks and shows what they found."""

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.markup import escape

from moecluster.cli.commands.doctor.finding import Finding, Level, problem, warning
from moecluster.cli.common.formatting import to_json
from moecluster.cli.common.tables import make_table, show_table
from moecluster.config import Config, read_config
from moecluster.config.load import override, parse_override
from moecluster.errors import MoeClusterError

GROUPS = ("software", "variables", "limits", "machine", "same_host", "network", "folders", "gpu")
STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A check with its finding."""

    group: str
    name: str
    finding: Finding


def doctor(target: str | None, settings: Sequence[str], as_json: bool, console: Console) -> bool:
    """Checks this host for the cluster of a target, or of the default settings. Returns whether it can start."""
    checked = run_checks(_config(target, settings), GROUPS)
    count = {level: sum(entry.finding.level is level for entry in checked) for level in Level}
    ready = not count[Level.PROBLEM]
    if as_json:
        console.print_json(to_json({"ready": ready, "checks": [_plain(entry) for entry in checked]}))
        return ready
    table = make_table("check", "state", "found", "what to do", prose=("found", "what to do"), box=None, pad_edge=False)
    for entry in checked:
        level = entry.finding.level
        table.add_row(
            entry.name,
            f"[{STYLES[level]}]{level.value}[/]",
            escape(entry.finding.found),
            escape(entry.finding.advice),
        )
    show_table(table, console)
    verdict = "a cluster can start here" if ready else "a cluster cannot start here"
    console.print(
        f"{_counted(count[Level.PROBLEM], 'problem')}, {_counted(count[Level.WARNING], 'warning')}: {verdict}",
        highlight=False,
    )
    return ready


def run_checks(config: Config, groups: Sequence[str]) -> list[Checked]:
    """Runs the checks of these groups, in order. One that fails itself does not hide the others."""
    found = []
    for group in groups:
        try:
            module = importlib.import_module(f"{__package__}.{group}")
        except ImportError as exc:
            finding = problem(f"cannot be checked: {exc}", "install what the check of packages names")
            found.append(Checked(group=group, name=group.replace("_", " "), finding=finding))
            continue
        for check in module.CHECKS:
            try:
                finding = check.run(config)
            except (OSError, ImportError, MoeClusterError) as exc:
                finding = warning(f"cannot be checked: {exc}", "see the other checks")
            found.append(Checked(group=group, name=check.name, finding=finding))
    return found


def _config(target: str | None, settings: Sequence[str]) -> Config:
    if target is None:
        return read_config(override({}, dict(parse_override(text) for text in settings)))
    from moecluster.cli.common.model_target import read_target  # imports packages that may be missing

    return read_target(target, settings)


def _plain(entry: Checked) -> dict[str, str]:
    return {"group": entry.group, "check": entry.name, **asdict(entry.finding)}


def _counted(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"
