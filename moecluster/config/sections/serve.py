"""Settings of the section [serve]."""

from dataclasses import dataclass
from typing import ClassVar

from moecluster.config.fields import MIB, Section, setting


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Section):
    """How requests are generated, how the gateway admits them, and how the number of routers follows the load."""

    section: ClassVar[str] = "serve"

    max_new_tokens: int = setting(128, "Default of `moecluster generate`: maximum number of new tokens.", minimum=1)
    temperature: float = setting(0.0, "Default of `moecluster generate`: sampling temperature. 0: greedy.", minimum=0)
    top_p: float = setting(
        1.0,
        "Default of `moecluster generate`: sample from the smallest set of tokens with this total probability.",
        above=0,
        maximum=1,
    )
    seed: int = setting(0, "Default of `moecluster generate`: seed of sampling.", minimum=0)
    max_running: int = setting(64, "Requests that a router generates at the same time.", minimum=1)
    max_waiting: int = setting(256, "Requests that may wait in a router. Further ones are refused.", minimum=0)
    max_waiting_tokens: int = setting(2**18, "Prompt tokens that may wait in a router.", minimum=1)
    max_cached_tokens: int = setting(
        2**14, "Size of a router's KV cache in tokens, for all running requests, prompts included.", minimum=64
    )
    max_batch_tokens: int = setting(
        512, "Tokens that a router computes in one step. Longer prompts are computed in chunks.", minimum=8
    )

    host: str = setting("127.0.0.1", "Address that the gateway listens on.")
    port: int = setting(8000, "Port of the gateway. 0: any free port.", minimum=0, maximum=65535)
    tls_certificate_file: str = setting(
        "",
        "Certificate of the gateway, with those between it and its CA (PEM). Read again when it changes. Empty: plain "
        "HTTP.",
    )
    tls_key_file: str = setting(
        "", "Private key of `tls_certificate_file` (PEM), which only its owner or group may read."
    )
    allow_unknown_fields: bool = setting(
        False, "Ignore unknown fields of HTTP requests instead of refusing the request (400)."
    )
    model_name: str = setting(
        "", "Name of the model in the API and in metrics. Empty: that of its directory, preset or TOML file."
    )
    max_body_bytes: int = setting(
        8 * MIB, "Largest body of an HTTP request. Larger ones are refused (413).", minimum=1024
    )
    max_buffered_bytes: int = setting(
        256 * MIB,
        "Total size of the bodies of all HTTP requests in flight. Requests beyond it are refused (429).",
        minimum=1024,
    )
    max_requests_per_minute: int = setting(
        0,
        "Requests a minute of one API key or token, or of one address where neither is asked for. More are refused "
        "(429). 0: no limit.",
        minimum=0,
    )
    max_inflight: int = setting(
        256,
        "HTTP requests in flight in the gateway, and likewise the generations that they ask for (n, several "
        "prompts). More are refused (429).",
        minimum=1,
    )
    max_awaited_bodies: int = setting(
        256,
        "Request bodies that the gateway receives at the same time. Beyond it, the client with the most of them "
        "loses its oldest one (408).",
        minimum=1,
    )
    max_connections: int = setting(
        4096,
        "Open connections to the gateway. Beyond it, the client with the most of them loses its oldest idle one.",
        minimum=1,
    )
    head_timeout_s: float = setting(30.0, "Deadline for the headers of an HTTP request to arrive.", above=0)
    body_timeout_s: float = setting(60.0, "Deadline for the body of an HTTP request to arrive.", above=0)
    send_timeout_s: float = setting(
        60.0, "A connection is closed when its client reads nothing of the response for this long.", above=0
    )
    request_timeout_s: float = setting(3600.0, "Deadline for one generation, from start to end.", above=0)
    max_restarts: int = setting(
        3, "How often `moecluster serve` restarts a cluster that it started after all of it was lost.", minimum=0
    )
    router_wait_timeout_s: float = setting(
        60.0,
        "How long a request waits for a router that generates it, at its start and after its router was lost.",
        above=0,
    )
    grace_s: float = setting(30.0, "How long responses may continue after the gateway was told to stop.", minimum=0)

    min_routers: int = setting(
        0,
        "Lower bound for autoscaling of routers. 0: disables scale-down (`moecluster scale --routers` may still "
        "go down to 1).",
        minimum=0,
    )
    max_routers: int = setting(
        0,
        "Upper bound for autoscaling of routers. 0: disables scale-up (`moecluster scale --routers` may still go "
        "up to 4 times cluster.num_routers).",
        minimum=0,
    )
    target_requests: float = setting(
        32.0, "Requests, running and waiting, that each router should have; autoscaling aims at it.", above=0
    )
    target_waiting: float = setting(
        1.0, "Average number of requests that may wait in a router before a router is added.", above=0
    )
    upscale_delay_s: float = setting(10.0, "How long more routers must be needed before they are started.", minimum=0)
    downscale_delay_s: float = setting(
        300.0, "How long fewer routers must be enough before some are drained.", minimum=0
    )
    router_drain_timeout_s: float = setting(
        300.0, "How long a router that is drained may take to finish its requests.", above=0
    )

    def check(self) -> None:
        if bool(self.tls_certificate_file) != bool(self.tls_key_file):
            lacks = "tls_key_file" if self.tls_certificate_file else "tls_certificate_file"
            raise self.complain(lacks, "expected both certificate and key, or neither")
        if self.max_buffered_bytes < self.max_body_bytes:
            raise self.complain("max_buffered_bytes", f"expected at least max_body_bytes = {self.max_body_bytes}")
        if self.max_routers and self.max_routers < self.min_routers:
            raise self.complain("max_routers", f"expected at least min_routers = {self.min_routers}")
