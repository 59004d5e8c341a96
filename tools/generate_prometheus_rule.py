"""Writes k8s/components/monitoring/rules.yaml, for the Prometheus operator, out of clusters/prometheus-rules.yml, or
with --check says whether it is stale.

Run by `make docs` and `make check`.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RULES = ROOT / "clusters" / "prometheus-rules.yml"
RESOURCE = ROOT / "k8s" / "components" / "monitoring" / "rules.yaml"
HEAD = """\
# Written by tools/generate_prometheus_rule.py: run `make docs`, do not edit. The rules are those of
# clusters/prometheus-rules.yml. The label `release` or whatever your Prometheus selects by is yours to add.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: moecluster
spec:
"""


def prometheus_rule() -> str:
    """Returns the resource, with the rules as they are written in their file."""
    text = RULES.read_text(encoding="utf-8")
    rules = text[text.index("groups:\n") :]
    return HEAD + "".join(f"  {line}" if line.strip() else line for line in rules.splitlines(keepends=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the committed resource is stale")
    if not parser.parse_args().check:
        RESOURCE.write_text(prometheus_rule(), encoding="utf-8")
        return 0
    if not RESOURCE.is_file() or RESOURCE.read_text(encoding="utf-8") != prometheus_rule():
        print(f"stale: {RESOURCE.relative_to(ROOT)}; run `make docs` and commit what it writes", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
