"""Optional packages: pip install 'moecluster[NAME]' installs those of an extra."""

import importlib.util

from moecluster.errors import ConfigError

EXTRAS = {
    "serve": ("fastapi", "uvicorn", "uvloop", "httptools"),
    "plots": ("matplotlib",),
    "certs": ("cryptography",),
}


def need(extra: str, what: str) -> None:
    """Raises ConfigError if a package of an extra is not installed. what: the feature, for the error message."""
    missing = [package for package in EXTRAS[extra] if not is_installed(package)]
    if missing:
        raise ConfigError(f"{what} needs {' and '.join(missing)}: pip install 'moecluster[{extra}]'")


def is_installed(package: str) -> bool:
    """Returns whether a package can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # blocked by an import hook, or removed from sys.modules
        return False
