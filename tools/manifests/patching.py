"""Changes plain data in the two ways that kustomize's patches have: JSON patches, and merges."""

from collections.abc import Sequence
from typing import Any


class PatchError(Exception):
    """A patch that does not fit."""


def copied(value: Any) -> Any:
    """Returns a copy that shares nothing, not even with itself (unlike copy.deepcopy)."""
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [copied(inner) for inner in value]
    return value


def read_pointer(value: Any, keys: Sequence[str]) -> Any:
    """Returns what lies at a path of keys. Raises PatchError."""
    for key in keys:
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError) as exc:
            raise PatchError(f"there is no {'/'.join(keys)}") from exc
    return value


def json_patch(document: Any, operations: Sequence[dict[str, Any]]) -> None:
    """Applies the operations add, replace and remove (RFC 6902) in place. Raises PatchError."""
    for operation in operations:
        *above, last = [_unescaped(key) for key in str(operation["path"]).split("/")[1:]]
        parent = read_pointer(document, above)
        match operation["op"]:
            case "add":
                _add(parent, last, copied(operation["value"]))
            case "replace":
                read_pointer(parent, [last])
                parent[int(last) if isinstance(parent, list) else last] = copied(operation["value"])
            case "remove":
                read_pointer(parent, [last])
                del parent[int(last) if isinstance(parent, list) else last]
            case other:
                raise PatchError(f"the operation {other} is not known here")


def _add(parent: Any, key: str, value: Any) -> None:
    if isinstance(parent, list):
        parent.insert(len(parent) if key == "-" else int(key), value)
    else:
        parent[key] = value


def _unescaped(key: str) -> str:
    return key.replace("~1", "/").replace("~0", "~")


def merge_patch(document: dict[str, Any], patch: dict[str, Any]) -> None:
    """Merges maps into maps, in place; replaces values and lists of values. Raises PatchError for lists of maps, which
    Kubernetes merges by keys that only its schemas know."""
    for key, value in patch.items():
        if key.startswith("$"):
            raise PatchError(f"the directive {key} is not known here")
        if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
            raise PatchError(f"{key}: lists of maps are not merged here; use a JSON patch")
        if isinstance(value, dict) and isinstance(document.get(key), dict):
            merge_patch(document[key], value)
        elif value is None:
            document.pop(key, None)
        else:
            document[key] = copied(value)
