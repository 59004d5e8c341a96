"""Refuses pods that run as root or without limits, and secrets in plain text."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tools.manifests.resources import Pod, Problem, Resource, pods_of, problem, walk

SECRET_NAME = re.compile(r"(token|password|passwd|secret|api_?key|credential)s?$", re.IGNORECASE)
HOST_FIELDS = ("hostNetwork", "hostPID", "hostIPC")


def hardening_problems(resource: Resource) -> list[Problem]:
    """Returns what is wrong with a resource."""
    found = [problem(resource, path, message) for path, message in _plain_secrets(resource)]
    for pod in pods_of(resource):
        found += (problem(resource, path, message) for path, message in _pod(pod))
    for path, key, value in walk(resource):
        if key == "autoscalerOptions":  # KubeRay makes a container of it
            found += (problem(resource, where, message) for where, message in _rights(path, value))
    return found


def _plain_secrets(resource: Resource) -> Iterator[tuple[str, str]]:
    if resource["kind"] == "Secret":
        for field in ("data", "stringData"):
            if resource.get(field):
                yield field, "a secret in plain text; name it in k8s/secrets.yaml, and create it apart"
    for path, key, value in walk(resource):
        named = value.get("name", "") if isinstance(value, Mapping) else ""
        if isinstance(value, Mapping) and "value" in value and (SECRET_NAME.search(key) or SECRET_NAME.search(named)):
            yield f"{path}.value", "a secret in plain text; refer to one with valueFrom.secretKeyRef"
        if key == "env":
            for i, variable in enumerate(value):
                if "value" in variable and SECRET_NAME.search(variable["name"]):
                    yield f"{path}.{i}.value", f"{variable['name']} in plain text; use valueFrom.secretKeyRef"


def _pod(pod: Pod) -> Iterator[tuple[str, str]]:
    security = pod.spec.get("securityContext", {})
    if security.get("runAsNonRoot") is not True:
        yield f"{pod.path}.securityContext.runAsNonRoot", "expected true"
    if not security.get("runAsUser"):
        yield f"{pod.path}.securityContext.runAsUser", "expected a user other than root (0)"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{pod.path}.securityContext.seccompProfile.type", "expected RuntimeDefault"
    for field in HOST_FIELDS:
        if pod.spec.get(field):
            yield f"{pod.path}.{field}", "a pod of moecluster needs nothing of its host"
    for i, volume in enumerate(pod.spec.get("volumes", ())):
        if "hostPath" in volume:
            yield f"{pod.path}.volumes.{i}.hostPath", "a pod of moecluster needs nothing of its host"
    for path, container in pod.containers:
        yield from _rights(path, container)
        yield from _resources(path, container)
        if not re.search(r":(?!latest$)[\w.-]+(@sha256:[0-9a-f]{64})?$", container.get("image", "")):
            yield f"{path}.image", f"{container.get('image')}: expected a tag other than latest"


def _rights(path: str, container: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False:
        yield f"{path}.securityContext.allowPrivilegeEscalation", "expected false"
    if security.get("privileged"):
        yield f"{path}.securityContext.privileged", "expected false"
    if security.get("readOnlyRootFilesystem") is not True:
        yield f"{path}.securityContext.readOnlyRootFilesystem", "expected true"
    if "ALL" not in security.get("capabilities", {}).get("drop", ()) or security["capabilities"].get("add"):
        yield f"{path}.securityContext.capabilities", "expected drop: [ALL], and none added"
    if security.get("runAsUser") == 0 or security.get("runAsNonRoot") is False:
        yield f"{path}.securityContext", "the container runs as root"


def _resources(path: str, container: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    resources = container.get("resources", {})
    for kind in ("requests", "limits"):
        for name in ("cpu", "memory"):
            if name not in resources.get(kind, {}):
                yield f"{path}.resources.{kind}.{name}", "missing"
