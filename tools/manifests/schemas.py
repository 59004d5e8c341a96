"""Validates resources strictly: Kubernetes' own kinds by kubernetes-validate, custom ones by the schemas of their CRDs.

The CRDs' rules in CEL are not evaluated.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import yaml

KUBERNETES_VERSION = "1.33"
CRD = "CustomResourceDefinition"
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"}, "namespace": {"type": "string"}, "labels": STRINGS, "annotations": STRINGS,
    },
    "required": ["name"],
    "additionalProperties": False,
}  # fmt: skip
MAX_MESSAGE = 300

Kind = tuple[str, str]  # apiVersion, kind


def is_custom(api_version: str) -> bool:
    """Returns whether a group is none of Kubernetes' own."""
    group = api_version.partition("/")[0] if "/" in api_version else ""
    return "." in group and not group.endswith(".k8s.io")


@dataclass(frozen=True, kw_only=True)
class Schemas:
    """The schemas of custom kinds."""

    by_kind: Mapping[Kind, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Schemas":
        """Reads the CRDs of a folder's YAML files. Raises ValueError if there is none."""
        found: dict[Kind, Any] = {}
        for path in sorted(folder.glob("*.yaml")):
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a CRD of Ray's has a megabyte
            for document in yaml.load_all(path.read_text(encoding="utf-8"), Loader=loader):
                if isinstance(document, dict) and document.get("kind") == CRD:
                    found |= _of_crd(document)
        if not found:
            raise ValueError(f"{folder}: holds no {CRD} in a *.yaml")
        return cls(by_kind=found)

    @cached_property
    def _validators(self) -> dict[Kind, Any]:
        return {kind: jsonschema.Draft202012Validator(schema) for kind, schema in self.by_kind.items()}

    def problems(self, resource: Mapping[str, Any]) -> list[str]:
        """Returns "field: what is wrong" for a resource that has a schema, or is of Kubernetes' own."""
        kind = (str(resource["apiVersion"]), str(resource["kind"]))
        if is_custom(kind[0]):
            return [
                f"{_path(error.absolute_path)}: {error.message[:MAX_MESSAGE]}"
                for error in self._validators[kind].iter_errors(resource)
            ]
        try:
            kubernetes_validate.validate(resource, KUBERNETES_VERSION, strict=True)
        except kubernetes_validate.ValidationError as exc:
            return [f"{_path(exc.absolute_path)}: {exc.message[:MAX_MESSAGE]}"]
        except kubernetes_validate.SchemaNotFoundError:
            return [f"apiVersion: Kubernetes {KUBERNETES_VERSION} has no {kind[1]} in {kind[0]}"]
        return []

    def has(self, resource: Mapping[str, Any]) -> bool:
        """Returns whether a resource can be validated."""
        api_version = str(resource["apiVersion"])
        return not is_custom(api_version) or (api_version, str(resource["kind"])) in self.by_kind


def _of_crd(crd: Mapping[str, Any]) -> dict[Kind, Any]:
    group, kind = crd["spec"]["group"], crd["spec"]["names"]["kind"]
    schemas = {}
    for version in crd["spec"]["versions"]:
        schema = _strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = METADATA
        schemas[f"{group}/{version['name']}", kind] = schema
    return schemas


def _strict(schema: Any) -> Any:
    """Returns a JSON schema of a CRD's structural one, in which unknown fields are errors."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if strict.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
        strict["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    keeps_unknown = strict.get("x-kubernetes-preserve-unknown-fields")
    if strict.get("type") == "object" and "properties" in strict and not keeps_unknown:
        strict.setdefault("additionalProperties", False)
    if strict.get("nullable") is True and isinstance(strict.get("type"), str):
        strict["type"] = [strict["type"], "null"]
    return strict


def _path(keys: Iterable[Any]) -> str:
    return ".".join(str(key) for key in keys) or "(top)"
