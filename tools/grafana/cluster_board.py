"""The board of a cluster: requests, expert actors, what the controller does, processes."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from tools.grafana.board import Section, board
from tools.grafana.panels import GOOD_IS_ZERO, NOTE_IF_ONE, bars, buckets, lines, number, quantiles, query, rows

BALANCE_STEPS = ((0.0, "red"), (0.7, "orange"), (0.9, "green"))
FAILED_SHARE_STEPS = ((0.0, "green"), (0.001, "orange"), (0.01, "red"))


def cluster_board() -> Dashboard:
    """Is anything ill, is the load even, what does a request cost, what did the controller do about it?"""
    return board(
        "cluster",
        "Cluster",
        "Requests, expert actors, operations and processes of one moecluster cluster.",
        [_at_a_glance(), _requests(), _gateway(), _actors(), _dispatch(), _controller(), _processes()],
    )


def _at_a_glance() -> Section:
    failed = 'sum(rate(moecluster_requests_total{SEEN, status="failed"}[RATE])) or vector(0)'
    return Section(
        title="At a glance",
        panels=[
            number(
                "Degraded",
                query("max(moecluster_degraded{SEEN})"),
                steps=GOOD_IS_ZERO,
                what="1: an expert actor does not serve, or an expert is lost.",
            ),
            number("Lost experts", query("max(moecluster_lost_experts{SEEN})"), steps=GOOD_IS_ZERO),
            number("Rebalancing", query("max(moecluster_rebalancing{SEEN})"), steps=NOTE_IF_ONE),
            number(
                "Worst balancedness",
                query("min(moecluster_layer_balancedness{SEEN})"),
                unit="percentunit",
                steps=BALANCE_STEPS,
                what="Of all layers; 1 is perfect.",
            ),
            number(
                "Dead experts",
                query("sum(moecluster_dead_experts{SEEN})"),
                what="No token was routed to them for a load window.",
            ),
            number("Requests failing", query(failed), unit="reqps", steps=FAILED_SHARE_STEPS),
            number("Requests ended", query("sum(rate(moecluster_requests_total{SEEN}[RATE]))"), unit="reqps"),
            number(
                "Tokens generated",
                query("sum(rate(moecluster_generated_tokens_total{SEEN}[RATE]))"),
                unit="cps",
                what="A second.",
            ),
            number("First token, p95", quantiles("moecluster_time_to_first_token_seconds")[1], unit="s"),
            number("Between tokens, p95", quantiles("moecluster_inter_token_seconds")[1], unit="s"),
            number("Expert actors serving", query('sum(moecluster_expert_actors{SEEN, state="serving"})')),
            number("Routers", query("max(moecluster_routers{SEEN})")),
        ],
    )


def _requests() -> Section:
    return Section(
        title="Requests",
        panels=[
            lines(
                "Requests ended",
                query("sum by (status) (rate(moecluster_requests_total{SEEN}[RATE]))", "{{status}}"),
                unit="reqps",
                stacked=True,
            ),
            lines(
                "Running and waiting",
                query("sum(moecluster_router_running_requests{SEEN})", "running"),
                query("sum(moecluster_router_waiting_requests{SEEN})", "waiting"),
            ),
            lines(
                "Tokens a second",
                query("sum(rate(moecluster_generated_tokens_total{SEEN}[RATE]))", "generated"),
                query(
                    "sum by (cached) (rate(moecluster_prompt_tokens_total{SEEN}[RATE]))", "prompt, cached {{cached}}"
                ),
            ),
            lines("Time to first token", *quantiles("moecluster_time_to_first_token_seconds"), unit="s"),
            lines("Time between tokens", *quantiles("moecluster_inter_token_seconds"), unit="s"),
            lines("Time of a request", *quantiles("moecluster_request_seconds"), unit="s"),
            buckets("First token, distribution", "moecluster_time_to_first_token_seconds"),
            buckets("Between tokens, distribution", "moecluster_inter_token_seconds"),
            lines(
                "Attention cache in use",
                query(
                    "sum by (instance) (moecluster_attention_cache_tokens{SEEN})"
                    " / sum by (instance) (moecluster_attention_cache_max_tokens{SEEN})",
                    "{{instance}}",
                ),
                unit="percentunit",
                high=1,
            ),
        ],
    )


def _gateway() -> Section:
    return Section(
        title="Gateway",
        panels=[
            lines(
                "HTTP requests",
                query(
                    "sum by (route, code) (rate(moecluster_gateway_requests_total{SEEN}[RATE]))",
                    "{{route}} {{code}}",
                ),
                unit="reqps",
                stacked=True,
            ),
            lines("First token at the gateway", *quantiles("moecluster_gateway_time_to_first_token_seconds"), unit="s"),
            lines("Between tokens at the gateway", *quantiles("moecluster_gateway_inter_token_seconds"), unit="s"),
            lines(
                "Tokens a second at the gateway",
                query("sum(rate(moecluster_gateway_generated_tokens_total{SEEN}[RATE]))", "tokens"),
            ),
            lines(
                "Failovers",
                query("sum(increase(moecluster_gateway_failovers_total{SEEN}[RATE]))", "requests"),
                what="Requests that went on at another router after theirs was lost.",
            ),
            lines("Routers that respond", query("min(moecluster_gateway_routers{SEEN})", "routers")),
            lines("In flight", query("sum(moecluster_gateway_requests_in_flight{SEEN})", "requests")),
        ],
        collapsed=True,
    )


def _actors() -> Section:
    return Section(
        title="Expert actors",
        panels=[
            lines(
                "Pairs computed a second",
                query("sum by (actor) (rate(moecluster_actor_tokens_total{SEEN}[RATE]))", "{{actor}}"),
                stacked=True,
            ),
            lines(
                "Busy",
                query("sum by (actor) (rate(moecluster_actor_busy_seconds_total{SEEN}[RATE]))", "{{actor}}"),
                unit="percentunit",
                what="Share of the time in which an actor computes.",
            ),
            lines("Rows waiting", query("sum by (actor) (moecluster_actor_queue_rows{SEEN})", "{{actor}}")),
            lines(
                "Rows of one computation",
                query(
                    "sum by (actor) (rate(moecluster_actor_tokens_total{SEEN}[RATE]))"
                    " / sum by (actor) (rate(moecluster_actor_expert_runs_total{SEEN}[RATE]))",
                    "{{actor}}",
                ),
                what="Larger batches cost less for each row.",
            ),
            lines(
                "Speed that the planner assumes",
                query("sum by (actor) (moecluster_actor_speed{SEEN})", "{{actor}}"),
                what="1 is typical.",
            ),
            lines("By state", query("sum by (state) (moecluster_expert_actors{SEEN})", "{{state}}"), stacked=True),
        ],
    )


def _dispatch() -> Section:
    return Section(
        title="Dispatch",
        panels=[
            lines(
                "Mean time of a message, by actor",
                query(
                    "sum by (actor) (rate(moecluster_dispatch_actor_seconds_total{SEEN}[RATE]))"
                    " / sum by (actor) (rate(moecluster_dispatch_actor_messages_total{SEEN}[RATE]))",
                    "{{actor}}",
                ),
                unit="s",
            ),
            lines("Time of a message, by transport", *quantiles("moecluster_dispatch_seconds", "transport"), unit="s"),
            lines(
                "Bytes a second",
                query(
                    "sum by (transport, direction) (rate(moecluster_dispatch_bytes_total{SEEN}[RATE]))",
                    "{{transport}} {{direction}}",
                ),
                unit="Bps",
            ),
            lines(
                "Messages sent again",
                query("sum by (reason) (rate(moecluster_dispatch_retries_total{SEEN}[RATE]))", "{{reason}}"),
                unit="cps",
            ),
            rows(
                "Lanes, and why not a better one",
                query("max by (router, actor, lane, reason) (moecluster_transport{SEEN})"),
                hidden=("Value",),
                width=16,
            ),
        ],
    )


def _controller() -> Section:
    return Section(
        title="What the controller did, and its price",
        panels=[
            lines(
                "Operations",
                query("sum by (kind, phase) (increase(moecluster_operations_total{SEEN}[RATE]))", "{{kind}} {{phase}}"),
                stacked=True,
            ),
            lines(
                "Duration of operations",
                query(
                    "sum by (kind) (rate(moecluster_operation_seconds_sum{SEEN}[RATE]))"
                    " / sum by (kind) (rate(moecluster_operation_seconds_count{SEEN}[RATE]))",
                    "{{kind}}",
                ),
                unit="s",
            ),
            lines(
                "Bytes moved a second",
                query("sum by (kind) (rate(moecluster_moved_bytes_total{SEEN}[RATE]))", "{{kind}}"),
                unit="Bps",
            ),
            lines(
                "Gain of the last operation",
                query("max by (kind, basis) (moecluster_operation_gain{SEEN})", "{{kind}} {{basis}}"),
                low=-1,
                what="Change of balancedness: predicted before, and measured over the load window after it.",
            ),
            lines(
                "Age of plan and load",
                query("max(moecluster_last_plan_age_seconds{SEEN})", "plan"),
                query("max(moecluster_last_load_age_seconds{SEEN})", "load"),
                unit="s",
            ),
            lines("Placement generation", query("max(moecluster_placement_generation{SEEN})", "generation")),
            lines(
                "Under way for", query("max by (kind) (moecluster_operation_age_seconds{SEEN})", "{{kind}}"), unit="s"
            ),
            lines(
                "Not as usual",
                query("max(moecluster_cold_experts{SEEN})", "cold experts"),
                query("max(moecluster_replicas_aside{SEEN})", "replicas set aside"),
                query("max(moecluster_placement_held{SEEN})", "placement held for training"),
            ),
        ],
    )


def _processes() -> Section:
    return Section(
        title="Processes",
        panels=[
            lines(
                "Resident memory",
                query("sum by (instance) (moecluster_process_resident_memory_bytes{SEEN})", "{{instance}}"),
                unit="bytes",
            ),
            lines(
                "Processor time",
                query("sum by (instance) (rate(moecluster_process_cpu_seconds_total{SEEN}[RATE]))", "{{instance}}"),
                what="Cores in use.",
            ),
            lines("Open files", query("sum by (instance) (moecluster_process_open_fds{SEEN})", "{{instance}}")),
            bars(
                "Up for",
                query("time() - max by (instance) (moecluster_start_time_seconds{SEEN})", "{{instance}}"),
                unit="s",
            ),
            rows(
                "Versions", query("count by (version, python, ray, torch, transformers) (moecluster_build_info{SEEN})")
            ),
        ],
        collapsed=True,
    )
