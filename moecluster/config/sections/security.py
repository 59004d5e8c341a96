"""Settings of the section [security]."""

import os
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
        "node; `~` is the home directory of the user who starts the cluster. With it, every gRPC port speaks mutual "
        "TLS only. Read again when it changes. Empty: plain text, on the loopback only.",
    )
    allow_plaintext: bool = setting(
        False, "Let servers listen beyond the loopback without TLS, on a network that encrypts already."
    )
    open_metrics: bool = setting(
        False, "Let everybody who reaches it read `/metrics`, of actors and gateway, without a token."
    )
    api_keys_file: str = setting(
        "",
        "File of API keys that the gateway accepts beside tokens, one per line. Empty: tokens alone; on the loopback, "
        "the user who runs the gateway needs none.",
    )
    allow_without_keys: bool = setting(False, "Let everybody who reaches the gateway use it without API key or token.")

    @property
    def tls_folder(self) -> str:
        """tls_dir as an absolute path; empty if there is none."""
        return os.path.abspath(os.path.expanduser(self.tls_dir)) if self.tls_dir else ""
