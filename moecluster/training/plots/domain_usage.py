"""Plots which experts serve which domain. Needs matplotlib."""

from pathlib import Path

from matplotlib.figure import Figure

from moecluster.training.domain_usage import DomainMap
from moecluster.whole_file import writing_whole

DOTS_PER_INCH = 120


def draw_domain_map(shares: DomainMap, path: str | Path) -> None:
    """Draws one heatmap per layer: experts across, domains down, the share in each cell.

    The file name's suffix selects the image format.
    """
    num_layers = len(shares.layers)
    size = (1.6 + 0.62 * shares.num_experts * num_layers, 1.7 + 0.5 * len(shares.domains))
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(1, num_layers, squeeze=False, sharey=True)[0]
    most = float(shares.share_DLE.max())
    for i, (axes, layer) in enumerate(zip(panels, shares.layers, strict=True)):
        share_DE = shares.share_DLE[:, i]
        image = axes.imshow(share_DE, cmap="Blues", vmin=0, vmax=most, aspect="auto")
        for d, row_E in enumerate(share_DE):
            for e, share in enumerate(row_E):
                colour = "white" if share > 0.6 * most else "black"
                axes.text(e, d, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_title(f"layer {layer}", fontsize=10)
        axes.set_xlabel("expert")
        axes.set_xticks(range(shares.num_experts))
        axes.set_yticks(range(len(shares.domains)), labels=list(shares.domains))
    figure.colorbar(image, ax=list(panels), label="share of the domain's tokens")
    figure.suptitle("Which experts serve which domain (percent of the domain's assignments in the layer)", fontsize=11)
    with writing_whole(Path(path)) as aside:
        figure.savefig(aside)
