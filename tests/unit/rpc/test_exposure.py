"""Servers beyond the loopback need certificates, or the user's word that the network encrypts."""

import pytest

from moecluster.config.sections import SecurityConfig
from moecluster.errors import ConfigError
from moecluster.rpc.exposure import is_loopback, refuse_plain_text

LOOPBACK = ("127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", "localhost")
BEYOND = ("0.0.0.0", "::", "10.0.0.5", "fd00::1", "::ffff:10.0.0.5", "node-7", "localhost.evil.example", "")


@pytest.mark.parametrize("host", LOOPBACK)
def test_the_loopback_needs_nothing(host: str) -> None:
    assert is_loopback(host)
    refuse_plain_text([host, "127.0.0.1"], SecurityConfig())


@pytest.mark.parametrize("host", BEYOND)
def test_other_addresses_need_certificates_or_a_word(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match=rf"cluster\.host: {host} is reached.*moecluster certs DIR.*allow_plaintext"):
        refuse_plain_text(["127.0.0.1", host], SecurityConfig())
    refuse_plain_text([host], SecurityConfig(tls_dir="/etc/moecluster/tls"))
    refuse_plain_text([host], SecurityConfig(allow_plaintext=True))
