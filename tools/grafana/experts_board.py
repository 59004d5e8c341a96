"""The board of the experts: which are hot or dead, is the load even, who holds what."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from tools.grafana.board import Section, board, choice
from tools.grafana.panels import bars, lines, matrix, query, rows

TOKENS = "sum by (layer, expert) (rate(moecluster_expert_tokens_total{SEEN}[RATE]))"
OF_LAYER = 'moecluster_expert_tokens_total{SEEN, layer="$layer"}'


def experts_board() -> Dashboard:
    """Which experts are hot or dead, is the load even, and which replica stands where with which share?"""
    return board(
        "experts",
        "Experts",
        "Load of the experts by layer, its balance, and their replicas.",
        [_balance(), _load(), _one_layer(), _trouble()],
        choices=[
            choice(
                "layer",
                'label_values(moecluster_layer_balancedness{model="$model", cluster="$cluster"}, layer)',
                "Layer",
            )
        ],
    )


def _balance() -> Section:
    return Section(
        title="Is the load even?",
        panels=[
            lines(
                "Balancedness",
                query("max by (layer) (moecluster_layer_balancedness{SEEN})", "layer {{layer}}"),
                unit="percentunit",
                high=1,
                what="Mean / maximum load of the actors, by their speeds; 1 is perfect.",
            ),
            lines(
                "Hottest expert / mean",
                query('max by (layer) (moecluster_overload_factor{SEEN, stat="now"})', "layer {{layer}}"),
                what="Before replicas share the load.",
            ),
            lines(
                "Evenness of the gate's choices",
                query("max by (layer) (moecluster_load_entropy{SEEN})", "layer {{layer}}"),
                unit="percentunit",
                high=1,
                what="Entropy of the experts' loads, divided by its maximum.",
            ),
            lines(
                "Dead experts",
                query("max by (layer) (moecluster_dead_experts{SEEN})", "layer {{layer}}"),
                what="No token was routed to them for a load window.",
            ),
            lines(
                "Overload, worst and mean of the last hour",
                query(
                    'max by (layer, stat) (moecluster_overload_factor{SEEN, stat!="now"})', "layer {{layer}} {{stat}}"
                ),
            ),
            lines(
                "How sure the gate is",
                query("avg by (layer) (moecluster_router_entropy{SEEN})", "layer {{layer}}"),
                what="Entropy in nats of a token's routing weights: low means that one expert gets nearly all.",
            ),
        ],
    )


def _load() -> Section:
    return Section(
        title="Which experts are hot?",
        panels=[
            matrix(
                "Tokens a second, layers x experts",
                query(TOKENS),
                row="layer",
                column="expert",
                unit="short",
                what="Beyond cluster.max_expert_series, only the hottest and coldest experts are shown.",
            ),
            bars("Hottest experts", query(f"topk(20, {TOKENS})", "{{layer}}/{{expert}}"), unit="cps"),
            bars("Coldest experts", query(f"bottomk(20, {TOKENS})", "{{layer}}/{{expert}}"), unit="cps"),
        ],
    )


def _one_layer() -> Section:
    return Section(
        title="Layer $layer",
        panels=[
            lines(
                "Tokens a second, by expert",
                query(f"topk(20, sum by (expert) (rate({OF_LAYER}[RATE])))", "expert {{expert}}"),
                stacked=True,
                width=12,
            ),
            lines(
                "Replicas",
                query(
                    'topk(20, max by (expert) (moecluster_expert_replicas{SEEN, layer="$layer"}))', "expert {{expert}}"
                ),
                width=12,
            ),
            rows(
                "Who holds which share",
                query('max by (expert, actor) (moecluster_replica_share{SEEN, layer="$layer"})'),
                unit="percentunit",
            ),
            rows(
                "Tokens that replicas have computed",
                query('sum by (expert, actor) (moecluster_replica_tokens_total{SEEN, layer="$layer"})'),
            ),
        ],
    )


def _trouble() -> Section:
    return Section(
        title="What should not be",
        panels=[
            lines(
                "Assignments dropped",
                query("sum by (layer) (rate(moecluster_dropped_assignments_total{SEEN}[RATE]))", "layer {{layer}}"),
                unit="cps",
                width=12,
                what="The expert was at its capacity.",
            ),
            lines(
                "Replies with NaN or infinity",
                query(
                    "sum by (layer, expert, actor) (increase(moecluster_nonfinite_replies_total{SEEN}[RATE]))",
                    "{{layer}}/{{expert}} of {{actor}}",
                ),
                width=12,
            ),
        ],
    )
