"""Checks that every package that users get has a licence of the list in pyproject.toml.

python -m tools.licenses: prints each package with its licence; exit code 1 names those that are not allowed.
"""

import sys
import tomllib
from collections.abc import Collection
from importlib import metadata
from pathlib import Path

from license_expression import ExpressionError, LicenseExpression, get_spdx_licensing

from tools.runtime_packages import runtime_packages

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
CLASSIFIER = "License :: OSI Approved :: "
# What packages without a License-Expression write, by its SPDX identifier.
NAMES = {
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",  # the classifier does not say which
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
UNKNOWN = "unknown"


def main() -> int:
    """Prints a line per package, and what is wrong on standard error."""
    allowed = tomllib.loads(PYPROJECT.read_text())["tool"]["moecluster"]["licenses"]["allowed"]
    found = licenses(runtime_packages())
    for name, license in sorted(found.items()):
        print(f"{name:24} {license}")
    wrong = refused(found, allowed)
    for name, license in sorted(wrong.items()):
        print(
            f"{name}: its licence {license} is not in tool.moecluster.licenses.allowed of pyproject.toml: "
            "do without it, or allow that licence",
            file=sys.stderr,
        )
    return bool(wrong)


def licenses(packages: Collection[str]) -> dict[str, str]:
    """Returns package -> its licence as an SPDX expression, or what it says instead."""
    return {name: _license_of(metadata.metadata(name)) for name in packages}


def refused(found: dict[str, str], allowed: Collection[str]) -> dict[str, str]:
    """Returns those whose licence is not allowed: of an OR one must be, of an AND all."""
    return {name: license for name, license in found.items() if not _is_allowed(license, allowed)}


def _license_of(about: metadata.PackageMetadata) -> str:
    fields = {key: about.get_all(key) or [] for key in ("License-Expression", "License", "Classifier")}
    if fields["License-Expression"]:
        return str(fields["License-Expression"][0])
    classified = [text.removeprefix(CLASSIFIER) for text in fields["Classifier"] if text.startswith(CLASSIFIER)]
    written = [text.strip() for text in fields["License"] if "\n" not in text.strip()]  # some write out its whole text
    said = written if written and (not classified or written[0] in NAMES) else classified
    return " AND ".join(dict.fromkeys(NAMES.get(text, text) for text in said)) or UNKNOWN


def _is_allowed(license: str, allowed: Collection[str]) -> bool:
    licensing = get_spdx_licensing()
    try:
        tree = licensing.parse(license, validate=True)
    except ExpressionError:
        return license in allowed

    def holds(node: LicenseExpression) -> bool:
        if isinstance(node, licensing.OR):
            return any(map(holds, node.args))
        if isinstance(node, licensing.AND):
            return all(map(holds, node.args))
        return str(node) in allowed

    return tree is not None and holds(tree)


if __name__ == "__main__":
    sys.exit(main())
