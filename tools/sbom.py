"""Writes a software bill of materials (CycloneDX, JSON) of what users get: moecluster and all that it needs.

python -m tools.sbom FILE: of this environment, without the developers' tools in it. CycloneDX's own tools are in an
environment of their own (`make sbom`).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from moecluster import __version__
from tools.runtime_packages import PACKAGE, runtime_packages

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / ".tools" / "sbom" / "bin" / "python"
SCHEMA = "1.6"
VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

wrong = JsonStrictValidator(SchemaVersion.from_version(sys.argv[1])).validate_str(sys.stdin.read())
sys.exit(wrong and f"no valid bill of materials: {wrong}")
"""


def main() -> int:
    """Writes the file that the command line names."""
    if len(sys.argv) != 2:
        print("usage: python -m tools.sbom FILE", file=sys.stderr)
        return 2
    if not TOOLS.exists():
        print(f"{TOOLS} is missing: make sbom makes it", file=sys.stderr)
        return 2
    found = subprocess.run(
        [
            *(str(TOOLS), "-m", "cyclonedx_py", "environment", "--pyproject", str(ROOT / "pyproject.toml")),
            *("--mc-type", "library", "--output-reproducible", "--no-validate", "--spec-version", SCHEMA),
            *("--output-file", "-", sys.executable),
        ],
        check=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    bill = pruned(json.loads(found.stdout))
    text = json.dumps(bill, indent=2, sort_keys=True) + "\n"
    if subprocess.run([str(TOOLS), "-c", VALIDATE, SCHEMA], input=text, text=True).returncode:
        return 1
    Path(sys.argv[1]).write_text(text)
    print(f"{sys.argv[1]}: {PACKAGE} {__version__} and {len(bill['components'])} packages that it needs")
    return 0


def pruned(bill: dict[str, Any]) -> dict[str, Any]:
    """Returns the bill with the packages alone that moecluster needs to run."""
    needed = runtime_packages()
    root = bill["metadata"]["component"]
    kept = [component for component in bill["components"] if canonicalize_name(component["name"]) in needed]
    refs = {root["bom-ref"], *(component["bom-ref"] for component in kept)}
    dependencies = [
        entry | {"dependsOn": [ref for ref in entry.get("dependsOn", ()) if ref in refs]}
        for entry in bill["dependencies"]
        if entry["ref"] in refs
    ]
    about = bill["metadata"] | {"component": root | {"version": __version__}}
    return bill | {"metadata": about, "components": kept, "dependencies": dependencies}


if __name__ == "__main__":
    sys.exit(main())
