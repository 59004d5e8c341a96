"""Packages that only some commands need: pip install 'moecluster[NAME]' brings those of an extra along."""

import importlib.util

from moecluster.errors import ConfigError

EXTRAS = {
    "serve": ("fastapi", "uvicorn", "uvloop", "httptools"),
    "plots": ("matplotlib",),
}


def need(extra: str, what: str) -> None:
    """Raises ConfigError if a package of an extra is not installed. what: is to be done with it, for the complaint."""
    missing = [package for package in EXTRAS[extra] if not is_installed(package)]
    if missing:
        raise ConfigError(f"{what} needs {' and '.join(missing)}: pip install 'moecluster[{extra}]'")


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # refused by an import hook, or torn out of sys.modules
        return False
