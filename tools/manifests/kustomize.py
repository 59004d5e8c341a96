"""Renders a kustomization: by kustomize or kubectl if there is one, else by a twin for what this project's files use.

The twin refuses every field that it does not know, so it never renders something else than kustomize would; a test
compares the two.
"""

import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tools.manifests.patching import PatchError, copied, json_patch, merge_patch, read_pointer

Resource = dict[str, Any]

TIMEOUT_S = 60.0
LOCAL_CONFIG = "config.kubernetes.io/local-config"  # kustomize leaves out what carries it
CLUSTER_SCOPED = {"Namespace", "PriorityClass"}
KINDS = {"Kustomization": "kustomize.config.k8s.io/v1beta1", "Component": "kustomize.config.k8s.io/v1alpha1"}
FIELDS = {
    "apiVersion", "kind", "namespace", "resources", "components", "configMapGenerator", "generatorOptions", "images",
    "patches", "replacements",
}  # fmt: skip


class RenderError(Exception):
    """A kustomization that cannot be rendered."""


def render(folder: Path) -> list[Resource]:
    """Returns the resources of a kustomization's folder. Raises RenderError."""
    command = kustomize_command()
    return render_by(command, folder) if command else twin(folder)


def kustomize_command() -> tuple[str, ...]:
    """Returns the command that renders the folder named after it; () if there is none."""
    if shutil.which("kustomize"):
        return ("kustomize", "build")
    if shutil.which("kubectl"):
        return ("kubectl", "kustomize")
    return ()


def render_by(command: Sequence[str], folder: Path) -> list[Resource]:
    """Returns the resources as a command renders them. Raises RenderError."""
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RenderError(f"{folder}: {done.stderr.strip()}")
    return [resource for resource in yaml.safe_load_all(done.stdout) if resource]


def twin(folder: Path) -> list[Resource]:
    """Returns the resources as kustomize would render them. Raises RenderError for what this does not know."""
    return _accumulate(folder, "Kustomization", [])


def _accumulate(folder: Path, kind: str, inherited: list[Resource]) -> list[Resource]:
    """Returns the resources after this kustomization. inherited: those that a component changes."""
    wanted = _read(folder, kind)
    resources = [*inherited]
    for entry in wanted.get("resources", ()):
        path = folder / entry
        found = _accumulate(path, "Kustomization", []) if path.is_dir() else load_all(path)
        for resource in found:
            _add(resources, resource, path)
    _generate(folder, wanted, resources)
    for entry in wanted.get("components", ()):
        resources = _accumulate(folder / entry, "Component", resources)
    for patch in wanted.get("patches", ()):
        _patch(folder, patch, resources)
    if namespace := wanted.get("namespace"):
        for resource in resources:
            if resource["kind"] not in CLUSTER_SCOPED:
                resource["metadata"]["namespace"] = namespace
    for image in wanted.get("images", ()):
        _set_image(folder, image, resources)
    for replacement in wanted.get("replacements", ()):
        _replace(folder, replacement, resources)
    return [resource for resource in resources if not _is_local(resource)]


def _read(folder: Path, kind: str) -> Mapping[str, Any]:
    path = folder / "kustomization.yaml"
    if not path.is_file():
        raise RenderError(f"{folder}: holds no kustomization.yaml")
    wanted: Mapping[str, Any]
    (wanted,) = load_all(path)
    _only(wanted, FIELDS, path)
    if wanted.get("kind") != kind or wanted.get("apiVersion") != KINDS[kind]:
        raise RenderError(f"{path}: expected apiVersion {KINDS[kind]}, kind {kind}")
    options = wanted.get("generatorOptions", {"disableNameSuffixHash": True})
    if options != {"disableNameSuffixHash": True}:
        raise RenderError(f"{path}: generatorOptions: only disableNameSuffixHash: true is known here")
    creates = [entry for entry in wanted.get("configMapGenerator", ()) if not _merges(entry)]
    if creates and "generatorOptions" not in wanted:
        raise RenderError(f"{path}: without generatorOptions.disableNameSuffixHash: true names get hashes")
    return wanted


def _merges(generator: Mapping[str, Any]) -> bool:
    return bool(generator.get("behavior") == "merge")


def _generate(folder: Path, wanted: Mapping[str, Any], resources: list[Resource]) -> None:
    for generator in wanted.get("configMapGenerator", ()):
        _only(generator, {"name", "behavior", "files", "options"}, folder)
        if generator.get("behavior", "create") not in ("create", "merge"):
            raise RenderError(f"{folder}: configMapGenerator: behavior {generator['behavior']} is not known here")
        data = {Path(file).name: (folder / file).read_text(encoding="utf-8") for file in generator["files"]}
        if _merges(generator):
            _find(resources, "ConfigMap", generator["name"], folder)["data"].update(data)
        else:
            options = generator.get("options", {})
            _only(options, {"labels"}, folder)
            metadata = {"name": generator["name"], **options}
            config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
            _add(resources, config_map, folder)


def _patch(folder: Path, patch: Mapping[str, Any], resources: list[Resource]) -> None:
    _only(patch, {"path", "patch", "target"}, folder)
    text = (folder / patch["path"]).read_text(encoding="utf-8") if "path" in patch else patch["patch"]
    content = yaml.safe_load(text)
    target = patch.get("target") or {"kind": content["kind"], "name": content["metadata"]["name"]}
    _only(target, {"kind", "name"}, folder)
    resource = _find(resources, target["kind"], target["name"], folder)
    try:
        if isinstance(content, list):
            json_patch(resource, content)
        elif content.get("$patch") == "delete":
            resources.remove(resource)
        else:
            merge_patch(resource, content)
    except PatchError as exc:
        raise RenderError(f"{folder}: patch of {target['kind']} {target['name']}: {exc}") from exc


def _set_image(folder: Path, image: Mapping[str, Any], resources: Iterable[Resource]) -> None:
    _only(image, {"name", "newName", "newTag"}, folder)
    for container in (c for resource in resources for c in containers_in(resource)):
        name, _, tag = str(container.get("image", "")).partition(":")
        if name == image["name"]:
            tag = str(image.get("newTag", tag))
            container["image"] = image.get("newName", name) + (f":{tag}" if tag else "")


def containers_in(value: Any) -> list[dict[str, Any]]:
    """Returns all containers and init containers, however deep they lie."""
    if isinstance(value, list):
        return [container for item in value for container in containers_in(item)]
    if not isinstance(value, dict):
        return []
    found: list[dict[str, Any]] = []
    for key, inner in value.items():
        if key in ("containers", "initContainers") and isinstance(inner, list):
            found += (item for item in inner if isinstance(item, dict))
        else:
            found += containers_in(inner)
    return found


def _replace(folder: Path, replacement: Mapping[str, Any], resources: list[Resource]) -> None:
    _only(replacement, {"source", "targets"}, folder)
    source = replacement["source"]
    _only(source, {"kind", "name", "fieldPath"}, folder)
    value = read_pointer(_find(resources, source["kind"], source["name"], folder), source["fieldPath"].split("."))
    for target in replacement["targets"]:
        _only(target, {"select", "fieldPaths"}, folder)
        _only(target["select"], {"kind", "name"}, folder)
        resource = _find(resources, target["select"]["kind"], target["select"]["name"], folder)
        for field_path in target["fieldPaths"]:
            *above, last = field_path.split(".")
            read_pointer(resource, above)[last] = copied(value)


def _find(resources: Iterable[Resource], kind: str, name: str, folder: Path) -> Resource:
    found = [r for r in resources if r["kind"] == kind and r["metadata"]["name"] == name]
    if len(found) != 1:
        raise RenderError(f"{folder}: there are {len(found)} resources {kind} {name}, expected one")
    return found[0]


def _add(resources: list[Resource], resource: Resource, path: Path) -> None:
    if not isinstance(resource, dict) or not {"apiVersion", "kind", "metadata"} <= resource.keys():
        raise RenderError(f"{path}: expected resources with apiVersion, kind and metadata")
    kind, name = resource["kind"], resource["metadata"]["name"]
    if any(other["kind"] == kind and other["metadata"]["name"] == name for other in resources):
        raise RenderError(f"{path}: {kind} {name} is there already")
    resources.append(resource)


def _is_local(resource: Resource) -> bool:
    return bool(resource["metadata"].get("annotations", {}).get(LOCAL_CONFIG) == "true")


def load_all(path: Path) -> list[Any]:
    """Returns the documents of a YAML file, with nothing shared between them. Raises RenderError."""
    try:
        text = path.read_text(encoding="utf-8")
        # Anchors make two places one object, and a change of one place must not change the other.
        return [copied(document) for document in yaml.safe_load_all(text) if document is not None]
    except (OSError, yaml.YAMLError) as exc:
        raise RenderError(f"{path}: cannot be read: {exc}") from exc


def _only(found: Mapping[str, Any], known: Iterable[str], where: Path) -> None:
    unknown = sorted(found.keys() - set(known))
    if unknown:
        raise RenderError(f"{where}: {', '.join(unknown)}: not known here")
