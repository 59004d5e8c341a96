"""Settings of the section [router]."""

from dataclasses import dataclass
from typing import ClassVar

from moecluster.config.fields import MIB, Section, setting


@dataclass(frozen=True, kw_only=True)
class RouterConfig(Section):
    """How a router reaches the experts."""

    section: ClassVar[str] = "router"

    transport: str = setting(
        "auto",
        "auto: rows travel through shared memory within a host, else inside messages. inline: always inside messages.",
        choices=("auto", "inline"),
    )
    shared_memory_bytes: int = setting(
        32 * MIB, "Shared memory of a router for each expert actor on its host and each direction.", minimum=MIB
    )
    request_timeout_s: float = setting(
        60.0, "Deadline for the expert actors to answer one batch of one layer, retries included.", above=0
    )
    threads: int = setting(1, "Compute threads of each router.", minimum=1)
