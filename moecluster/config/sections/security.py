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
    api_keys_file: str = setting(
        "", "File of API keys that the gateway accepts, one per line. Empty: it asks for no key."
    )
    allow_without_keys: bool = setting(
        False, "Let the gateway listen on addresses beyond the loopback without API keys."
    )
