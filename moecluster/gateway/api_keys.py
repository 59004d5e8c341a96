"""The gateway's API keys."""

import hashlib
import hmac
import stat
from collections.abc import Iterable
from pathlib import Path

from moecluster.errors import ConfigError

SCHEME = "bearer"


class ApiKeys:
    """Digests of the accepted keys; the keys themselves are not kept."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """keys: none, or some."""
        self._digests = tuple({_digest(key) for key in keys})

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, authorization: str | None) -> str | None:
        """Returns a name for the owner of the key in an Authorization header, which does not reveal the key; None if it
        carries none of the keys."""
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        # Compare with all of them, so that the time reveals nothing.
        known = sum(hmac.compare_digest(given, digest) for digest in self._digests)
        return f"key {given.hex()}" if scheme.lower() == SCHEME and known else None


def read_api_keys(file: str | Path) -> ApiKeys:
    """Reads a file with one key per line; skips empty lines and lines that begin with #. Raises ConfigError, also if
    everybody may read the file."""
    try:
        if stat.S_IMODE(Path(file).stat().st_mode) & 0o007:
            raise ConfigError(
                f"security.api_keys_file: everybody may read {file}; make it yours alone: chmod 600 {file}"
            )
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"security.api_keys_file: {file} cannot be read: {type(exc).__name__}") from exc
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"security.api_keys_file: {file} holds no key, expected one a line")
    if any(" " in key or not key.isascii() for key in keys):
        raise ConfigError(f"security.api_keys_file: {file} holds a line that is no key: expected ASCII without spaces")
    return ApiKeys(keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
