"""API keys: read from a file, and when a gateway may listen to other machines."""

from pathlib import Path
from typing import Any

import pytest

from moecluster.config.sections import SecurityConfig, ServeConfig
from moecluster.errors import ConfigError
from moecluster.gateway.api_keys import ApiKeys, read_api_keys
from moecluster.gateway.server import keys_for

LOOPBACK = ("127.0.0.1", "::1", "localhost", "127.8.8.8")
BEYOND = ("0.0.0.0", "::", "10.1.2.3", "example.org")


def key_file(path: Path, content: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(content)
    return path


def test_keys_of_a_file_are_let_in_and_not_kept(tmp_path: Path) -> None:
    keys = read_api_keys(key_file(tmp_path / "keys", "# of the team\nsk-one\n\n  sk-two  \n"))
    owners = {keys.owner(a) for a in ("Bearer sk-one", "bearer sk-two", "Bearer  sk-one")}
    assert len(owners) == 2 and None not in owners and not any("sk-" in str(owner) for owner in owners)
    for wrong in (None, "", "Bearer", "Bearer sk-three", "sk-one", "Basic sk-one", "Bearer # of the team"):
        assert keys.owner(wrong) is None
    assert "sk-one" not in repr(vars(keys))
    assert ApiKeys().owner("Bearer ") is None and not ApiKeys()


@pytest.mark.parametrize("content", ["", "# nothing\n", "two words\n", "schlüssel\n"])
def test_a_file_without_usable_keys_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match=r"security\.api_keys_file") as refused:
        read_api_keys(key_file(tmp_path / "keys", content))
    assert "two words" not in str(refused.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_api_keys(tmp_path / "none")


def test_a_file_that_everybody_may_read_is_refused(tmp_path: Path) -> None:
    file = key_file(tmp_path / "keys", "sk-one\n")
    file.chmod(0o604)
    with pytest.raises(ConfigError, match=rf"everybody may read {file}.*chmod 600"):
        read_api_keys(file)
    file.chmod(0o640)
    assert read_api_keys(file)


def test_beyond_the_loopback_tls_is_asked_for(tmp_path: Path) -> None:
    file = str(key_file(tmp_path / "keys", "sk-one\n"))
    for host in BEYOND:
        for without in (SecurityConfig(), SecurityConfig(api_keys_file=file), SecurityConfig(allow_without_keys=True)):
            with pytest.raises(ConfigError, match=rf"serve\.host: {host} .*tls_certificate_file.*allow_plaintext"):
                keys_for(ServeConfig(host=host), without)
        assert not keys_for(ServeConfig(host=host), SecurityConfig(allow_plaintext=True))
        with_tls = ServeConfig(host=host, tls_certificate_file="c", tls_key_file="k")
        assert not keys_for(with_tls, SecurityConfig())
        assert keys_for(with_tls, SecurityConfig(api_keys_file=file))
    for host in LOOPBACK:
        assert not keys_for(ServeConfig(host=host), SecurityConfig())


@pytest.mark.parametrize("given", ["tls_certificate_file", "tls_key_file"])
def test_a_certificate_needs_its_key(given: str) -> None:
    files: dict[str, Any] = {given: "x"}
    with pytest.raises(ConfigError, match="expected both certificate and key, or neither"):
        ServeConfig(**files)
