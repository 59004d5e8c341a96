"""API keys."""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from moecluster.errors import ConfigError
from moecluster.gateway.api_errors import ApiError

SCHEME = "bearer"


class ApiKeys:
    """Digests of the accepted keys; the keys themselves are not kept."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """No keys: every request is accepted."""
        self._digests = tuple({_digest(key) for key in keys})

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> tuple[str, ...]:
        """Returns a name for the key's owner that does not reveal the key; () if there are no keys.

        Raises ApiError 401 if there are keys and the Authorization header carries none of them.
        """
        if not self._digests:
            return ()
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        # Compare with all of them, so that the time reveals nothing.
        known = sum(hmac.compare_digest(given, digest) for digest in self._digests)
        if scheme.lower() == SCHEME and known:
            return (f"key {given.hex()}",)
        message = "no API key was given" if not authorization else "the API key is wrong"
        raise ApiError(
            401,
            f"{message}; expected the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def read_api_keys(file: str | Path) -> ApiKeys:
    """Reads a file with one key per line; skips empty lines and lines that begin with #. Raises ConfigError."""
    try:
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
