"""The sections of the settings. Every default works on a laptop.

To add a setting, add one line to its section. Names carry their units; documentation stands in the line.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from moecluster.config.fields import Section, setting

MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Section):
    """Where the actors run, and what each takes."""

    section: ClassVar[str] = "cluster"

    name: str = setting("moecluster", "Ray namespace of the cluster; one cluster serves one model")
    address: str = setting("", "address of a running Ray cluster; empty: the local one, started if there is none")
    num_expert_actors: int = setting(4, "expert actors to start", minimum=1)
    num_routers: int = setting(1, "routers to start; all reach the same experts", minimum=1)
    cpus_per_expert_actor: float = setting(0.25, "CPUs that Ray reserves for an expert actor", minimum=0)
    gpus_per_expert_actor: float = setting(0.0, "GPUs that Ray reserves for an expert actor", minimum=0)
    cpus_per_router: float = setting(0.5, "CPUs that Ray reserves for the router", minimum=0)
    gpus_per_router: float = setting(0.0, "GPUs that Ray reserves for the router", minimum=0)
    host: str = setting("127.0.0.1", "address that gRPC and metrics servers listen on")
    metrics_port: int = setting(0, "first port of the actors' /metrics; 0: any free port", minimum=0, maximum=65535)
    max_expert_series: int = setting(
        1024, "series of one per-expert metric that a process shows; beyond it the highest and quantiles", minimum=0
    )
    max_message_bytes: int = setting(256 * MIB, "largest gRPC message that is sent or taken", minimum=MIB)
    start_timeout_s: float = setting(120.0, "longest wait for all actors to be ready", above=0)

    def check(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", self.name):
            raise self.complain("name", "expected up to 63 letters, digits, dots, dashes and underscores")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """A Hugging Face directory (`path`), or the architecture of a model of the native family trained from nothing."""

    section: ClassVar[str] = "model"

    path: str = setting("", "directory of a Hugging Face checkpoint; if given, it alone says the architecture")
    dtype: str = setting(
        "float32",
        "type of parameters and activations; float16 to serve only",
        choices=("float32", "bfloat16", "float16"),
    )
    vocab_size: int = setting(259, "token ids; 259: the 256 bytes and begin, end and padding marks", minimum=1)
    hidden_size: int = setting(128, "width D of the trunk", minimum=1)
    num_layers: int = setting(4, "decoder layers", minimum=1)
    num_heads: int = setting(4, "attention heads", minimum=1)
    num_kv_heads: int = setting(2, "heads of keys and values; divides num_heads", minimum=1)
    max_positions: int = setting(1024, "longest sequence in tokens", minimum=1)
    rope_theta: float = setting(10000.0, "base of the rotary position frequencies", above=0)
    initializer_range: float = setting(0.02, "standard deviation of fresh matrices", above=0)
    tie_embeddings: bool = setting(False, "use the input embedding as the output head")
    gate: str = setting("mixtral", "name of the gate that chooses experts")
    gate_options: Mapping[str, Any] = setting({}, "options of that gate, for example router_aux_loss_coef")
    num_experts: int = setting(8, "routed experts E of an MoE layer", minimum=1)
    top_k: int = setting(2, "experts K that a token visits", minimum=1)
    expert_kind: str = setting("glu", "what an expert computes: glu, ffn")
    expert_inner_size: int = setting(256, "inner width F of an expert", minimum=1)
    activation: str = setting("silu", "activation of experts and dense layers: silu, gelu, relu")
    num_shared_experts: int = setting(0, "experts that every token visits; they stay in the trunk", minimum=0)
    moe_every: int = setting(1, "every n-th layer is MoE: layer i if (i + 1) is divisible by n", minimum=1)
    first_dense_layers: int = setting(0, "leading layers that are dense whatever moe_every says", minimum=0)
    dense_inner_size: int = setting(512, "inner width of the dense layers", minimum=1)

    def check(self) -> None:
        if self.hidden_size % (2 * self.num_heads):
            raise self.complain("hidden_size", f"expected a multiple of 2 * num_heads = {2 * self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise self.complain("num_kv_heads", f"expected a divisor of num_heads = {self.num_heads}")
        if self.top_k > self.num_experts:
            raise self.complain("top_k", f"expected at most num_experts = {self.num_experts}")
        if not any(self.is_moe_layer(layer) for layer in range(self.num_layers)):
            raise self.complain(
                "moe_every",
                f"no layer is MoE: num_layers = {self.num_layers}, first_dense_layers = "
                f"{self.first_dense_layers}; expected moe_every in reach of a layer after the dense ones",
            )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a decoder layer, counted from 0, has experts."""
        return layer >= self.first_dense_layers and (layer + 1) % self.moe_every == 0


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(Section):
    """What an expert actor does with its experts."""

    section: ClassVar[str] = "experts"

    optimizer: str = setting("adamw", "optimizer that lives with each expert", choices=("adamw", "sgd"))
    momentum: float = setting(0.0, "momentum of sgd", minimum=0, below=1)
    batch_invariant: bool = setting(False, "bit for bit equal outputs whatever the batch, at a price in speed")
    activation_budget_bytes: int = setting(256 * MIB, "activations kept for backward; beyond it: recompute", minimum=0)
    max_queue_bytes: int = setting(256 * MIB, "rows that may wait in an actor; beyond it: refused", minimum=MIB)
    threads: int = setting(1, "compute threads of an expert actor", minimum=1)


@dataclass(frozen=True, kw_only=True)
class RouterConfig(Section):
    """How a router reaches the experts."""

    section: ClassVar[str] = "router"

    transport: str = setting("auto", "auto: shared memory where it works", choices=("auto", "inline"))
    shared_memory_bytes: int = setting(32 * MIB, "shared memory per direction and expert actor", minimum=MIB)
    request_timeout_s: float = setting(60.0, "deadline of a batch, retries included", above=0)
    max_inflight_bytes: int = setting(256 * MIB, "rows sent and not yet answered, per expert actor", minimum=MIB)
    threads: int = setting(1, "compute threads of the router", minimum=1)


@dataclass(frozen=True, kw_only=True)
class ControllerConfig(Section):
    """How experts are placed, and for how long a router is waited for."""

    section: ClassVar[str] = "controller"

    placement: str | Mapping[str, tuple[str, ...]] = setting(
        "contiguous",
        'which actor holds which experts: contiguous, or a table such as expert-0 = ["0/3", "*/1"] of layer/index, '
        "where layer * means every MoE layer",
        choices=("contiguous",),
    )
    lease_s: float = setting(10.0, "how long a silent router counts when an expert is unloaded", above=0)
    health_period_s: float = setting(1.0, "time between looks at the expert actors", above=0)

    policy: str = setting("share", "what decides: share, eplb, or static, which moves nothing")
    period_s: float = setting(2.0, "time between decisions", above=0)
    load_source: str = setting("direct", "where loads come from", choices=("direct", "prometheus"))
    prometheus_address: str = setting("", "of the Prometheus server that scrapes the actors: http://host:port")
    window_s: float = setting(30.0, "how far back the load is looked at", above=0)
    window: str = setting(
        "exponential",
        "exponential: older tokens count less, half after window_s / 2; sliding: all of window_s alike",
        choices=("exponential", "sliding"),
    )
    slots_per_layer: int = setting(
        0, "replicas of each layer that an actor has room for; 0: as many as num_redundant_experts asks for", minimum=0
    )
    num_redundant_experts: int = setting(
        0, "room for replicas of each layer beyond one per expert, over the least number of actors", minimum=0
    )
    move_budget_bytes: int = setting(
        1024 * MIB, "bytes that one decision may load, move_burst aside; 0: shares only", minimum=0
    )
    move_burst: float = setting(
        3.0,
        "budgets that a decision may borrow from later ones, which then load the less, where more moves pay than "
        "its own allows, as when the topic changes at once; 0: none",
        minimum=0,
    )
    max_move_bytes_per_s: int = setting(0, "pace of a copy from actor to actor; 0: as fast as it goes", minimum=0)
    drain_timeout_s: float = setting(10.0, "longest wait for routers and queues before an expert is unloaded", above=0)
    operation_timeout_s: float = setting(
        600.0, "longest wait for an actor that an operation has asked for, or for all to load new weights", above=0
    )
    update_timeout_s: float = setting(
        3600.0, "how long texts that were begun with old weights keep them: as long as the longest text takes", above=0
    )

    min_expert_actors: int = setting(0, "fewest expert actors; 0: no fewer than now but by order, then 1", minimum=0)
    max_expert_actors: int = setting(
        0, "most expert actors; 0: no more than now but by order, then 4 x cluster.num_expert_actors", minimum=0
    )
    target_queue_s: float = setting(0.05, "time that a message may wait at an actor before more actors help", above=0)
    target_utilisation: float = setting(0.7, "busy share of the time that the actors are sized for", above=0, maximum=1)
    upscale_delay_s: float = setting(30.0, "how long actors must be too few before more are started", minimum=0)
    downscale_delay_s: float = setting(600.0, "how long actors must be too many before some are drained", minimum=0)
    scale_to_zero_after_s: float = setting(
        0.0, "experts that no token wanted for so long are unloaded until one does; 0: never", minimum=0
    )

    def check(self) -> None:
        if self.load_source == "prometheus" and not self.prometheus_address.startswith(("http://", "https://")):
            raise self.complain("prometheus_address", "expected http://host:port, as load_source is prometheus")
        if self.max_expert_actors and self.max_expert_actors < self.min_expert_actors:
            raise self.complain("max_expert_actors", f"expected at least min_expert_actors = {self.min_expert_actors}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """One training run."""

    section: ClassVar[str] = "train"

    data: str = setting("stdlib", "a text file or directory, or stdlib: source and prose that every machine has")
    tokenizer: str = setting("", "tokenizer directory; empty: bytes")
    max_left_out_share: float = setting(
        0.1, "part of a text directory's bytes that may be no UTF-8 text and is left out", minimum=0, maximum=1
    )
    output_dir: str = setting("runs/moecluster", "where checkpoints and figures go")
    steps: int = setting(300, "optimizer steps", minimum=1)
    batch_size: int = setting(16, "sequences per step, over all micro-batches", minimum=1)
    micro_batches: int = setting(1, "parts that a step's batch is computed in; divides batch_size", minimum=1)
    sequence_length: int = setting(128, "tokens per sequence", minimum=2)
    lr: float = setting(1e-3, "peak learning rate", above=0)
    warmup_steps: int = setting(20, "steps of linear warm-up", minimum=0)
    min_lr_ratio: float = setting(0.1, "end of the cosine, as a fraction of lr", minimum=0, maximum=1)
    weight_decay: float = setting(0.1, "decoupled weight decay of matrices", minimum=0)
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW's decay rates", minimum=0, below=1)
    eps: float = setting(1e-8, "AdamW's epsilon", above=0)
    max_grad_norm: float = setting(1.0, "global gradient norm, trunk and experts together; 0: no clipping", minimum=0)
    seed: int = setting(0, "seed of parameters, data order and gates", minimum=0)
    durability: str = setting("checkpoint", "what a step survives", choices=("checkpoint", "none"))
    deterministic: bool = setting(False, "sum gradients in a fixed order, for runs equal bit for bit")
    checkpoint_every_steps: int = setting(100, "steps between checkpoints; 0: only the last", minimum=0)
    keep_checkpoints: int = setting(2, "checkpoints kept", minimum=1)
    max_restarts: int = setting(
        3,
        "how often a run whose router was lost begins again from its last checkpoint, under durability checkpoint",
        minimum=0,
    )
    participant_timeout_s: float = setting(5.0, "how long an actor is asked again before it counts as lost", above=0)
    checkpoint_errors: str = setting("stop", "what a full disk does to the run", choices=("stop", "continue"))
    resume: bool = setting(False, "go on from the last checkpoint in output_dir, if there is one")
    eval_every_steps: int = setting(50, "steps between evaluations; 0: only the last", minimum=0)
    eval_batches: int = setting(8, "batches of one evaluation", minimum=1)

    def check(self) -> None:
        if self.batch_size % self.micro_batches:
            raise self.complain("micro_batches", f"expected a divisor of batch_size = {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Section):
    """How text is generated, and how the HTTP gateway takes requests for it."""

    section: ClassVar[str] = "serve"

    max_new_tokens: int = setting(256, "longest continuation in tokens", minimum=1)
    temperature: float = setting(0.0, "sampling temperature; 0: greedy", minimum=0)
    top_p: float = setting(1.0, "sample from the smallest set with this probability", above=0, maximum=1)
    seed: int = setting(0, "seed of sampling", minimum=0)
    max_running: int = setting(64, "texts that a router writes together", minimum=1)
    max_waiting: int = setting(256, "texts that wait behind those in a router; beyond it they are refused", minimum=0)
    max_waiting_tokens: int = setting(2**18, "tokens of the prompts that wait in a router", minimum=1)
    max_cached_tokens: int = setting(
        2**14, "room of a router's attention cache: tokens of all texts that are written, prompts included", minimum=64
    )
    max_batch_tokens: int = setting(
        512, "tokens that a router computes at once; longer prompts are computed in parts", minimum=8
    )

    host: str = setting("127.0.0.1", "address that the HTTP gateway listens on")
    port: int = setting(8000, "port of the HTTP gateway; 0: any free one", minimum=0, maximum=65535)
    allow_unknown_fields: bool = setting(False, "ignore fields of HTTP requests that are not known; else: 400")
    model_name: str = setting("", "the model's name in the API; empty: that of its directory, preset or TOML file")
    max_body_bytes: int = setting(8 * MIB, "largest body of an HTTP request; beyond it: 413", minimum=1024)
    max_buffered_bytes: int = setting(256 * MIB, "bodies of all requests in flight; beyond it: 429", minimum=1024)
    max_inflight: int = setting(256, "requests, and texts, in flight in the gateway; beyond it: 429", minimum=1)
    max_awaited_bodies: int = setting(
        256, "bodies that are awaited at once; beyond it the oldest of the client that has most is given up", minimum=1
    )
    max_connections: int = setting(
        4096,
        "connections to the HTTP gateway; beyond it the oldest idle one of the client that has most ends",
        minimum=1,
    )
    head_timeout_s: float = setting(30.0, "longest wait for a request's headers", above=0)
    body_timeout_s: float = setting(60.0, "longest wait for a request's body", above=0)
    send_timeout_s: float = setting(60.0, "how long a client may take in nothing of its answer", above=0)
    request_timeout_s: float = setting(3600.0, "longest time that a text may take", above=0)
    max_restarts: int = setting(
        3, "how often `moecluster serve` brings the cluster that it started up again when all of it is lost", minimum=0
    )
    router_patience_s: float = setting(60.0, "how long a text waits for a router that writes it", above=0)
    grace_s: float = setting(30.0, "time that begun answers have to end when the gateway is asked to", minimum=0)

    min_routers: int = setting(0, "fewest routers; 0: no fewer than now but by order, then 1", minimum=0)
    max_routers: int = setting(
        0, "most routers; 0: no more than cluster.num_routers but by order, then 4 times as many", minimum=0
    )
    target_texts: float = setting(32.0, "texts, running and waiting, that a router shall have at once", above=0)
    target_waiting: float = setting(1.0, "texts that may wait at a router before more routers help", above=0)
    upscale_delay_s: float = setting(10.0, "how long routers must be too few before more are started", minimum=0)
    downscale_delay_s: float = setting(300.0, "how long routers must be too many before some leave", minimum=0)
    router_drain_timeout_s: float = setting(300.0, "longest wait for the texts of a router that leaves", above=0)

    def check(self) -> None:
        if self.max_buffered_bytes < self.max_body_bytes:
            raise self.complain("max_buffered_bytes", f"expected at least max_body_bytes = {self.max_body_bytes}")
        if self.max_routers and self.max_routers < self.min_routers:
            raise self.complain("max_routers", f"expected at least min_routers = {self.min_routers}")


@dataclass(frozen=True, kw_only=True)
class SecurityConfig(Section):
    """Who may talk to the cluster."""

    section: ClassVar[str] = "security"

    ray_auth: str = setting("token", "authentication of a Ray cluster started here", choices=("token", "disabled"))
    api_keys_file: str = setting("", "API keys that the HTTP gateway lets in, one a line; empty: it asks for none")
    allow_without_keys: bool = setting(False, "let the HTTP gateway listen beyond the loopback without API keys")
