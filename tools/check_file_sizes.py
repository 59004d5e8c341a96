"""Reports source files that exceed the line limit. Run by `make check`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("moecluster", "actors", "benchmarks", "tools", "tests")
GENERATED = ROOT / "moecluster" / "proto"
MAX_LINES = 400


def too_long() -> list[str]:
    """Returns one message per file that is too long."""
    found = []
    for file in sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")):
        lines = len(file.read_text().splitlines())
        if lines > MAX_LINES and not file.is_relative_to(GENERATED):
            found.append(f"{file.relative_to(ROOT)}: {lines} lines, at most {MAX_LINES}; give it one job less")
    return found


if __name__ == "__main__":
    for line in (long := too_long()):
        print(line, file=sys.stderr)
    sys.exit(1 if long else 0)
