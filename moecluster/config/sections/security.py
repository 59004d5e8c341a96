"""Settings of the section [security]."""

from dataclasses import dataclass
from typing import ClassVar

from moecluster.config.fields import Section, setting


@dataclass(frozen=True, kw_only=True)
class SecurityConfig(Section):
    """Who may use the cluster."""

    section: ClassVar[str] = "security"

    ray_auth: str = setting(
        "token", "Authentication of a Ray cluster that moecluster starts.", choices=("token", "disabled")
    )
    tls_dir: str = setting(
        "",
        "Folder with `ca.crt`, `tls.crt` and `tls.key` (PEM; `moecluster certs` makes them), at the same path on every "
        "node. With it, every gRPC port speaks mutual TLS only. Read again when it changes. Empty: plain text, on the "
        "loopback only.",
    )
    allow_plaintext: bool = setting(
        False, "Let servers listen beyond the loopback without TLS, on a network that encrypts already."
    )
    api_keys_file: str = setting(
        "", "File of API keys that the gateway accepts, one per line. Empty: it asks for no key."
    )
    allow_without_keys: bool = setting(
        False, "Let the gateway listen on addresses beyond the loopback without API keys."
    )
