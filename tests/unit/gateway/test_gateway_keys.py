"""API keys: read from a file, and when none are required."""

from pathlib import Path

import pytest

from moecluster.config.sections import SecurityConfig, ServeConfig
from moecluster.errors import ConfigError
from moecluster.gateway.api_errors import ApiError
from moecluster.gateway.api_keys import ApiKeys, read_api_keys
from moecluster.gateway.server import keys_for


def test_keys_of_a_file_are_let_in_and_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nsk-one\n\n  sk-two  \n")
    keys = read_api_keys(file)
    for authorization in ("Bearer sk-one", "bearer sk-two", "Bearer  sk-one"):
        keys.check(authorization)
    for wrong in (None, "", "Bearer", "Bearer sk-three", "sk-one", "Basic sk-one", "Bearer # of the team"):
        with pytest.raises(ApiError) as refused:
            keys.check(wrong)
        assert refused.value.status == 401 and refused.value.code == "invalid_api_key"
        assert "sk-" not in refused.value.message
    assert "sk-one" not in repr(vars(keys))
    ApiKeys().check(None)


@pytest.mark.parametrize("content", ["", "# nothing\n", "two words\n", "schlüssel\n"])
def test_a_file_without_usable_keys_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"security\.api_keys_file") as refused:
        read_api_keys(file)
    assert "two words" not in str(refused.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_api_keys(tmp_path / "none")


def test_beyond_the_loopback_keys_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-one\n")
    for host in ("0.0.0.0", "::", "10.1.2.3", "example.org"):
        with pytest.raises(ConfigError, match=r"serve\.host"):
            keys_for(ServeConfig(host=host), SecurityConfig())
        assert not keys_for(ServeConfig(host=host), SecurityConfig(allow_without_keys=True))
        assert keys_for(ServeConfig(host=host), SecurityConfig(api_keys_file=str(file)))
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        assert not keys_for(ServeConfig(host=host), SecurityConfig())
