"""The Python twin of kustomize: it renders what kustomize renders, and refuses what it does not know."""

from pathlib import Path

import pytest

from tools.manifests.kustomize import RenderError, kustomize_command, render_by, twin
from tools.manifests.patching import PatchError, json_patch, merge_patch
from tools.validate_manifests import overlays

HEAD = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
MAP = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {x: y}\n"


@pytest.mark.skipif(not kustomize_command(), reason="neither kustomize nor kubectl is on PATH")
@pytest.mark.parametrize("folder", overlays(), ids=lambda folder: folder.name)
def test_the_twin_renders_what_kustomize_renders(folder: Path) -> None:
    def by_name(resources: list[dict]) -> dict:
        return {(r["kind"], r["metadata"]["name"]): r for r in resources}

    assert by_name(twin(folder)) == by_name(render_by(kustomize_command(), folder))


def kustomization(folder: Path, text: str, **files: str) -> Path:
    (folder / "kustomization.yaml").write_text(HEAD + text)
    (folder / "map.yaml").write_text(MAP)
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(content)
    return folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resources: [map.yaml]\nhelmCharts: []\n", "helmCharts: not known here"),
        ("resources: [map.yaml]\nimages: [{name: a, digest: b}]\n", "digest: not known here"),
        ("resources: [map.yaml, map.yaml]\n", "ConfigMap a is there already"),
        ("resources: [none.yaml]\n", "none.yaml: cannot be read"),
        ("configMapGenerator: [{name: b, files: [map.yaml]}]\n", "names get hashes"),
        ("configMapGenerator: [{name: b, literals: [c=d]}]\ngeneratorOptions: {disableNameSuffixHash: true}\n",
         "literals: not known here"),
        ("resources: [map.yaml]\npatches: [{target: {kind: ConfigMap, name: b}, patch: '[]'}]\n",
         "0 resources ConfigMap b"),
        ("resources: [map.yaml]\npatches: [{target: {kind: ConfigMap, name: a}, patch: '[{op: move, path: /data}]'}]\n",
         "the operation move is not known here"),
    ],
)  # fmt: skip
def test_what_the_twin_does_not_know_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RenderError, match=message):
        twin(kustomization(tmp_path, text))


def test_a_component_is_no_kustomization(tmp_path: Path) -> None:
    folder = kustomization(tmp_path, "")
    text = (folder / "kustomization.yaml").read_text().replace("Kustomization", "Component")
    (folder / "kustomization.yaml").write_text(text)
    with pytest.raises(RenderError, match=r"expected apiVersion .*kind Kustomization"):
        twin(folder)


def test_json_patches() -> None:
    document = {"a": {"b/c": [1, 2]}, "d": 1}
    json_patch(
        document,
        [
            {"op": "add", "path": "/a/b~1c/-", "value": 3},
            {"op": "add", "path": "/a/b~1c/0", "value": 0},
            {"op": "replace", "path": "/d", "value": {"e": 2}},
            {"op": "remove", "path": "/a/b~1c/1"},
        ],
    )
    assert document == {"a": {"b/c": [0, 2, 3]}, "d": {"e": 2}}
    for wrong in ({"op": "replace", "path": "/f", "value": 1}, {"op": "remove", "path": "/a/b~1c/9"}):
        with pytest.raises(PatchError, match="there is no"):
            json_patch(document, [wrong])


def test_merges() -> None:
    document = {"a": {"b": 1, "c": 2}, "d": [1, 2]}
    merge_patch(document, {"a": {"c": None, "e": 3}, "d": [3]})
    assert document == {"a": {"b": 1, "e": 3}, "d": [3]}
    with pytest.raises(PatchError, match="d: lists of maps"):
        merge_patch(document, {"d": [{"x": 1}]})
    with pytest.raises(PatchError, match="patch"):
        merge_patch(document, {"a": {"$patch": "replace"}})
