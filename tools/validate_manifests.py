"""Validates the Kubernetes manifests: schemas, references and rights of every overlay as it is rendered.

Custom resources need the schemas of their CRDs: MOECLUSTER_CRDS=FOLDER names a folder with *.yaml of KubeRay's and the
Prometheus operator's CRDs. Without it they are not validated, which is said in one line. Run by `make check`.

    python -m tools.validate_manifests [FOLDER ...]      # folders of kustomizations; default: all of k8s/
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from tools.manifests.hardening import hardening_problems
from tools.manifests.kustomize import RenderError, Resource, kustomize_command, render
from tools.manifests.references import Rendering, reference_problems
from tools.manifests.resources import problem
from tools.manifests.schemas import Schemas, is_custom

ROOT = Path(__file__).resolve().parent.parent
K8S = ROOT / "k8s"
CRDS_VARIABLE = "MOECLUSTER_CRDS"


def overlays() -> list[Path]:
    """Returns the folders that users apply, and the base that they change."""
    return [K8S / "base", *sorted(path.parent for path in K8S.glob("overlays/*/kustomization.yaml"))]


def external_secrets() -> Mapping[str, Sequence[str]]:
    """Returns name -> keys of the secrets that are created apart."""
    content = yaml.safe_load((K8S / "secrets.yaml").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def problems_of(resources: Sequence[Resource], schemas: Schemas) -> list[str]:
    """Returns "kind name: field: what is wrong" of a rendering."""
    found = []
    for resource in resources:
        if schemas.has(resource):
            found += [problem(resource, *line.split(": ", 1)) for line in schemas.problems(resource)]
        found += hardening_problems(resource)
    found += reference_problems(Rendering.of(resources, external_secrets()))
    return [str(each) for each in found]


def main(folders: Sequence[Path]) -> int:
    """Prints what is wrong, and what could not be validated. Returns an exit code."""
    crds = os.environ.get(CRDS_VARIABLE, "")
    schemas = Schemas.read(Path(crds)) if crds else Schemas()
    not_validated, bad, count = set(), 0, 0
    for folder in folders:
        where = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
        try:
            resources = render(folder)
        except RenderError as exc:
            print(f"{where}: {exc}", file=sys.stderr)
            bad += 1
            continue
        count += len(resources)
        not_validated |= {str(r["kind"]) for r in resources if is_custom(r["apiVersion"]) and not schemas.has(r)}
        for line in (found := problems_of(resources, schemas)):
            print(f"{where}: {line}", file=sys.stderr)
        bad += len(found)
    if not_validated:
        why = f"{crds} has none" if crds else f"{CRDS_VARIABLE} names no folder of CRDs"
        print(f"not validated against a schema, as {why} for them: {', '.join(sorted(not_validated))}")
    by = " ".join(kustomize_command()) or "the Python twin of kustomize"
    print(f"{count} resources of {len(folders)} kustomizations, rendered by {by}: {bad} problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main([Path(each).resolve() for each in sys.argv[1:]] or overlays()))
