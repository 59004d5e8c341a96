"""What users get: the packages that moecluster needs, their licences, and the bill of materials of a release."""

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from moecluster import __version__
from tools.licenses import PYPROJECT, licenses, refused
from tools.runtime_packages import runtime_packages
from tools.sbom import TOOLS

ROOT = PYPROJECT.parent
ALLOWED = tomllib.loads(PYPROJECT.read_text())["tool"]["moecluster"]["licenses"]["allowed"]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, *lines: str) -> None:
        about = tmp_path / f"{name.replace('-', '_')}-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", f"Name: {name}", "Version: 1", *lines]))

    return install


def test_what_users_get_holds_extras_and_no_tools_of_developers() -> None:
    found = runtime_packages()
    assert {"torch", "ray", "numpy", "fastapi", "matplotlib", "starlette"} <= found.keys()
    assert not {"pytest", "ruff", "moecluster", "hypothesis", "build"} & found.keys()
    assert "fastapi" not in runtime_packages(extras=())


def test_packages_are_followed_through_markers_and_extras(installed: Any) -> None:
    installed("root", "Requires-Dist: first[more]", 'Requires-Dist: never; python_version < "3"')
    installed("first", 'Requires-Dist: second; extra == "more"', 'Requires-Dist: other; extra == "less"')
    installed("second", "Requires-Dist: First")
    assert runtime_packages("root", ()) == {"first": "root", "second": "first"}
    installed("torn", "Requires-Dist: no-such-package")
    with pytest.raises(LookupError, match="no-such-package is needed and not installed"):
        runtime_packages("torn", ())


def test_every_package_that_users_get_has_an_allowed_licence() -> None:
    assert refused(licenses(runtime_packages()), ALLOWED) == {}


@pytest.mark.parametrize(
    ("lines", "expected", "allowed"),
    [
        (["License-Expression: MIT OR GPL-3.0-only"], "MIT OR GPL-3.0-only", True),
        (["License-Expression: MIT AND GPL-3.0-only"], "MIT AND GPL-3.0-only", False),
        (["License-Expression: (MIT OR GPL-3.0-only) AND Zlib"], "(MIT OR GPL-3.0-only) AND Zlib", True),
        (["License-Expression: Apache-2.0 WITH LLVM-exception"], "Apache-2.0 WITH LLVM-exception", True),
        (["License: Apache 2.0"], "Apache-2.0", True),
        (["License: Proprietary"], "Proprietary", False),
        (["Classifier: License :: OSI Approved :: MIT License"], "MIT", True),
        (["License: The MIT License", "Classifier: License :: OSI Approved :: MIT License"], "MIT", True),
        (
            ["Classifier: License :: OSI Approved :: GNU Affero General Public License v3"],
            "GNU Affero General Public License v3",
            False,
        ),
        (["Summary: none"], "unknown", False),
    ],
)
def test_a_licence_is_read_as_it_is_written_and_judged(
    installed: Any, lines: list[str], expected: str, allowed: bool
) -> None:
    installed("some-package", *lines)
    found = licenses(["some-package"])
    assert found == {"some-package": expected}
    assert refused(found, ALLOWED) == ({} if allowed else found)


def test_nothing_slows_the_import_of_ray() -> None:
    """Where rfc3987-syntax is installed, jsonschema compiles its grammar when Ray is imported, for seconds."""
    assert importlib.util.find_spec("rfc3987_syntax") is None


@pytest.mark.skipif(not TOOLS.exists(), reason="make sbom installs CycloneDX's tools")
def test_the_bill_of_materials_names_what_users_get_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "moecluster.cdx.json"
    done = subprocess.run(
        [sys.executable, "-m", "tools.sbom", str(file)], cwd=ROOT, capture_output=True, text=True
    )  # it validates the file against CycloneDX's schema
    assert done.returncode == 0, done.stderr[-3000:]
    bill = json.loads(file.read_text())
    root = bill["metadata"]["component"]
    assert (root["name"], root["version"], root["licenses"][0]["license"]["id"]) == (
        "moecluster",
        __version__,
        "Apache-2.0",
    )
    names = {component["name"].lower().replace("_", "-") for component in bill["components"]}
    assert names == runtime_packages().keys()
    assert all(component["purl"].startswith("pkg:pypi/") for component in bill["components"])
    edges = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}
    assert any(ref.startswith("torch==") for ref in edges[root["bom-ref"]])
    assert not any(ref.startswith("pytest==") for refs in edges.values() for ref in refs)
