"""What the shell offers after TAB: presets, clusters, settings. Imports little, since the user waits for it."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import typer

from moecluster.config.load import SECTIONS, preset_names
from moecluster.errors import MoeClusterError


def targets(ctx: typer.Context, incomplete: str) -> list[str] | list[tuple[str, str]]:
    """Returns the presets; the shell itself offers files and directories where none fits.

    bash splits words at "=": what follows `--set section.key=` then arrives as the next argument.
    """
    given = ctx.params.get("settings") or ()
    if given and "=" not in given[-1]:
        return [(text.partition("=")[2], doc) for text, doc in settings(f"{given[-1]}=")]
    return [name for name in preset_names() if name.startswith(incomplete)]


def settings(incomplete: str) -> list[tuple[str, str]]:
    """Returns (section.key=, its sentence) of the settings that begin so, or (section.key=value, sentence) of one."""
    found = [setting for setting in _all_settings() if f"{setting[0]}=".startswith(incomplete.partition("=")[0])]
    if len(found) > 1 and "=" not in incomplete:
        return [(f"{key}=", doc) for key, doc, _ in found]
    return [
        (f"{key}={value}", doc)
        for key, doc, values in found
        # Beside a value always the key alone: of two, the shell completes what they share, and adds no space.
        for value in ("", *values)
        if f"{key}={value}".startswith(incomplete)
    ]


def clusters(incomplete: str) -> list[str]:
    """Returns the names of the clusters that this user has started on this host."""
    from moecluster.rpc.credentials import state_folder

    try:
        return sorted(file.stem for file in state_folder().glob("[!.]*.json") if file.stem.startswith(incomplete))
    except (OSError, MoeClusterError):
        return []


def _all_settings() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yields (section.key, sentence, values that are likely)."""
    for section in SECTIONS.values():
        hints = get_type_hints(section)
        for declared in fields(section):
            yield f"{section.section}.{declared.name}", declared.metadata["doc"], _values(declared, hints)


def _values(declared: Any, hints: dict[str, Any]) -> tuple[str, ...]:
    if declared.metadata["choices"]:
        return tuple(declared.metadata["choices"])
    hint = hints[declared.name]
    if bool in (hint, *get_args(hint)):
        return ("true", "false")
    if isinstance(declared.default, int | float) or (isinstance(declared.default, str) and declared.default):
        return (str(declared.default),)
    return ()
