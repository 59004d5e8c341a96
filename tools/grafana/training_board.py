"""The board of a training run."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from tools.grafana.board import Section, board
from tools.grafana.panels import buckets, lines, number, quantiles, query

STEPS = "rate(moecluster_train_step_seconds_count{SEEN}[RATE])"


def training_board() -> Dashboard:
    """Does the loss fall, what does a step cost, were steps run again, does the router collapse?"""
    return board(
        "training",
        "Training",
        "Loss, steps and routing of a training run.",
        [_at_a_glance(), _loss(), _routing()],
    )


def _at_a_glance() -> Section:
    return Section(
        title="At a glance",
        panels=[
            number(
                "Loss", query("max(moecluster_train_loss{SEEN})"), what="Nats per token, of the last step.", width=6
            ),
            number("Steps a minute", query(f"60 * sum({STEPS})"), width=6),
            number("Step, p95", quantiles("moecluster_train_step_seconds")[1], unit="s", width=6),
            number(
                "Steps run again",
                query("sum(moecluster_train_step_replays_total{SEEN}) or vector(0)"),
                width=6,
                what="Since the run's process started: a lost actor, a lost message.",
            ),
        ],
    )


def _loss() -> Section:
    return Section(
        title="Loss and steps",
        panels=[
            lines("Cross-entropy", query("max(moecluster_train_loss{SEEN})", "nats per token"), width=12),
            lines(
                "Auxiliary losses",
                query("max by (loss) (moecluster_train_aux_loss{SEEN})", "{{loss}}"),
                width=12,
                what="Times their coefficients, over all layers.",
            ),
            lines("Duration of a step", *quantiles("moecluster_train_step_seconds"), unit="s"),
            buckets("Steps, distribution", "moecluster_train_step_seconds"),
            lines(
                "Attempts that were run again",
                query("sum(increase(moecluster_train_step_replays_total{SEEN}[RATE]))", "attempts"),
            ),
        ],
    )


def _routing() -> Section:
    return Section(
        title="Routing",
        panels=[
            lines(
                "How sure the gate is",
                query("avg by (layer) (moecluster_router_entropy{SEEN})", "layer {{layer}}"),
                what="Entropy in nats of a token's routing weights. If it falls to 0 early, the gate collapses.",
            ),
            lines(
                "Evenness of its choices",
                query("max by (layer) (moecluster_load_entropy{SEEN})", "layer {{layer}}"),
                unit="percentunit",
                high=1,
            ),
            lines("Dead experts", query("max by (layer) (moecluster_dead_experts{SEEN})", "layer {{layer}}")),
            lines(
                "Assignments dropped",
                query("sum by (layer) (rate(moecluster_dropped_assignments_total{SEEN}[RATE]))", "layer {{layer}}"),
                unit="cps",
            ),
            lines(
                "Actors busy",
                query("sum by (actor) (rate(moecluster_actor_busy_seconds_total{SEEN}[RATE]))", "{{actor}}"),
                unit="percentunit",
            ),
            lines("Placement held", query("max(moecluster_placement_held{SEEN})", "1: by a training run")),
        ],
    )
