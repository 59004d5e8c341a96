"""Writes the Grafana boards to k8s/components/monitoring/boards, or with --check says whether they are stale.

Run by `make docs` and `make check`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from tools.grafana.cluster_board import cluster_board
from tools.grafana.experts_board import experts_board
from tools.grafana.training_board import training_board

FOLDER = Path(__file__).resolve().parent.parent / "k8s" / "components" / "monitoring" / "boards"
BOARDS: Mapping[str, Callable[[], Dashboard]] = {
    "cluster.json": cluster_board,
    "experts.json": experts_board,
    "training.json": training_board,
}


def content(make: Callable[[], Dashboard]) -> str:
    """Returns a board's JSON."""
    return json.dumps(make(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a committed board is stale")
    written = {FOLDER / name: content(make) for name, make in BOARDS.items()}
    if not parser.parse_args().check:
        FOLDER.mkdir(exist_ok=True)
        for path, text in written.items():
            path.write_text(text)
        return 0
    if stale := [path.name for path, text in written.items() if not path.is_file() or path.read_text() != text]:
        print(f"stale: {', '.join(stale)} in {FOLDER.name}; run `make docs` and commit what it writes", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
