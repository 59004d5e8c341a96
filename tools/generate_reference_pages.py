"""Writes docs/configuration.md and docs/metrics.md out of the code, or with --check says whether they are stale.

Run by `make docs` and `make check`.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tools.configuration_page import configuration_page
from tools.metrics_page import metrics_page

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES: Mapping[str, Callable[[], str]] = {"configuration.md": configuration_page, "metrics.md": metrics_page}


def stale_pages() -> list[str]:
    """Names of pages that are not what the code says now."""
    return [name for name, page in PAGES.items() if not _is(DOCS / name, page())]


def _is(path: Path, content: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a committed page is stale")
    if not parser.parse_args().check:
        for name, page in PAGES.items():
            (DOCS / name).write_text(page(), encoding="utf-8")
        return 0
    if stale := stale_pages():
        print(f"stale: {', '.join(stale)} in docs; run `make docs` and commit what it writes", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
