"""Finds pods, and what resources name, in rendered resources."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Resource = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod's template, wherever it lies in a resource."""

    path: str  # of its spec
    labels: Mapping[str, str]
    spec: Mapping[str, Any]
    claims: frozenset[str] = frozenset()  # names of volumeClaimTemplates

    @property
    def containers(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Its containers with their paths."""
        return [
            (f"{self.path}.{kind}.{i}", container)
            for kind in ("initContainers", "containers")
            for i, container in enumerate(self.spec.get(kind, ()))
        ]

    @property
    def ports(self) -> Mapping[str, int]:
        """Its named ports."""
        return {
            port["name"]: port["containerPort"]
            for _, container in self.containers
            for port in container.get("ports", ())
            if "name" in port
        }


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with a resource."""

    kind: str
    name: str
    path: str  # of the field
    message: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.path}: {self.message}"


def problem(resource: Resource, path: str, message: str) -> Problem:
    """Returns a problem of a resource."""
    return Problem(
        kind=resource["kind"], name=resource["metadata"].get("name", ""), path=path.removeprefix("."), message=message
    )


def pods_of(resource: Resource) -> list[Pod]:
    """Returns the pods that a resource is or creates."""
    claims = frozenset(claim["metadata"]["name"] for claim in resource.get("spec", {}).get("volumeClaimTemplates", ()))
    return [
        Pod(path=path.removeprefix("."), labels=labels, spec=spec, claims=claims)
        for path, labels, spec in _templates(resource, "")
    ]


def _templates(value: Any, path: str) -> Iterator[tuple[str, Mapping[str, str], Mapping[str, Any]]]:
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _templates(item, f"{path}.{i}")
    if not isinstance(value, Mapping):
        return
    spec = value.get("spec")
    if isinstance(spec, Mapping) and isinstance(spec.get("containers"), list):
        yield f"{path}.spec", (value.get("metadata") or {}).get("labels") or {}, spec
        return
    for key, inner in value.items():
        yield from _templates(inner, f"{path}.{key}")


def walk(value: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yields path, key and value of every field, however deep."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from walk(item, f"{path}.{i}")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            here = f"{path}.{key}"
            yield here.removeprefix("."), str(key), inner
            yield from walk(inner, here)


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Returns whether a label selector selects labels. Raises ValueError for an operator that this does not know."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for wanted in selector.get("matchExpressions", ()):
        if wanted["operator"] != "In":
            raise ValueError(f"the operator {wanted['operator']} is not known here")
        if labels.get(wanted["key"]) not in wanted["values"]:
            return False
    return True
