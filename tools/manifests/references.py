"""Checks that whatever a resource names exists in the same rendering: secrets, config maps, volumes, labels, ports."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.manifests.resources import Pod, Problem, Resource, pods_of, problem, selects, walk

TLS_KEYS = frozenset({"ca.crt", "tls.crt", "tls.key"})

Found = Iterator[tuple[str, str]]  # path of the field, what is wrong


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """What the resources of one rendering offer each other."""

    resources: Sequence[Resource]
    secrets: Mapping[str, frozenset[str]]  # name -> keys
    pods: Sequence[Pod]

    @classmethod
    def of(cls, resources: Sequence[Resource], external_secrets: Mapping[str, Sequence[str]]) -> "Rendering":
        """external_secrets: name -> keys of those that are created apart."""
        secrets = {name: frozenset(keys) for name, keys in external_secrets.items()}
        secrets |= {r["spec"]["secretName"]: TLS_KEYS for r in resources if r["kind"] == "Certificate"}
        pods = [pod for resource in resources for pod in pods_of(resource)]
        return cls(resources=resources, secrets=secrets, pods=pods)

    def config_maps(self) -> dict[str, frozenset[str]]:
        """Names and keys."""
        return {r["metadata"]["name"]: frozenset(r.get("data", {})) for r in self.resources if r["kind"] == "ConfigMap"}

    def names(self, kind: str) -> set[str]:
        return {r["metadata"]["name"] for r in self.resources if r["kind"] == kind}

    def services(self) -> dict[str, set[int]]:
        """Names and ports, also of those that KubeRay makes."""
        found = {r["metadata"]["name"]: r["spec"] for r in self.resources if r["kind"] == "Service"}
        made = [r["spec"]["serveService"] for r in self.resources if "serveService" in r.get("spec", {})]
        found |= {service["metadata"]["name"]: service["spec"] for service in made}
        return {name: {port["port"] for port in spec.get("ports", ())} for name, spec in found.items()}

    def selected(self, selector: Mapping[str, Any]) -> list[Pod]:
        return [pod for pod in self.pods if selects(selector, pod.labels)]


def reference_problems(rendering: Rendering) -> list[Problem]:
    """Returns every reference that leads nowhere."""
    found = []
    for resource in rendering.resources:
        for pod in pods_of(resource):
            found += [problem(resource, path, why) for path, why in _of_pod(pod, rendering)]
        found += [problem(resource, path, why) for path, why in _of_fields(resource, rendering)]
        check = BY_KIND.get(resource["kind"])
        found += [problem(resource, path, why) for path, why in (check(resource, rendering) if check else ())]
    return found


def _of_pod(pod: Pod, rendering: Rendering) -> Found:
    volumes: set[str] = set(pod.claims)
    for i, volume in enumerate(pod.spec.get("volumes", ())):
        path = f"{pod.path}.volumes.{i}"
        volumes.add(volume["name"])
        if "secret" in volume and volume["secret"]["secretName"] not in rendering.secrets:
            yield f"{path}.secret.secretName", _no("secret", volume["secret"]["secretName"])
        if "configMap" in volume and volume["configMap"]["name"] not in rendering.config_maps():
            yield f"{path}.configMap.name", _no("config map", volume["configMap"]["name"])
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim and claim not in rendering.names("PersistentVolumeClaim"):
            yield f"{path}.persistentVolumeClaim.claimName", _no("claim", claim)
    for path, container in pod.containers:
        for i, mount in enumerate(container.get("volumeMounts", ())):
            if mount["name"] not in volumes:
                yield f"{path}.volumeMounts.{i}.name", _no("volume", mount["name"])
        for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
            for handler in ("httpGet", "tcpSocket"):
                port = container.get(kind, {}).get(handler, {}).get("port")
                if isinstance(port, str) and port not in pod.ports:
                    yield f"{path}.{kind}.{handler}.port", _no("port", port)
    priority = pod.spec.get("priorityClassName")
    if priority and priority not in rendering.names("PriorityClass"):
        yield f"{pod.path}.priorityClassName", _no("priority class", priority)
    account = pod.spec.get("serviceAccountName")
    if account and account not in rendering.names("ServiceAccount"):
        yield f"{pod.path}.serviceAccountName", _no("service account", account)
    for i, spread in enumerate(pod.spec.get("topologySpreadConstraints", ())):
        if not selects(spread.get("labelSelector", {}), pod.labels):
            yield f"{pod.path}.topologySpreadConstraints.{i}.labelSelector", "does not select its own pod"


def _of_fields(resource: Resource, rendering: Rendering) -> Found:
    """Fields that mean the same wherever they are."""
    for path, key, value in walk(resource):
        if key == "secretKeyRef":
            yield from _secret_key(path, value, rendering)
        if key == "configMapKeyRef" and value["key"] not in rendering.config_maps().get(value["name"], ()):
            yield path, _no("key in a config map", f"{value['name']}/{value['key']}")
        if key == "authOptions" and value.get("mode") == "token":
            yield from _secret_key(path, {"name": value.get("secretName"), "key": "auth_token"}, rendering)


def _secret_key(path: str, reference: Mapping[str, str], rendering: Rendering) -> Found:
    if reference["key"] not in rendering.secrets.get(reference["name"], ()):
        yield path, _no("key in a secret", f"{reference['name']}/{reference['key']}")


def _service(resource: Resource, rendering: Rendering) -> Found:
    pods = rendering.selected({"matchLabels": resource["spec"].get("selector", {})})
    if not pods:
        yield "spec.selector", "selects no pod"
    for i, port in enumerate(resource["spec"].get("ports", ())):
        yield from _named_port(f"spec.ports.{i}.targetPort", port.get("targetPort"), pods)


def _disruption_budget(resource: Resource, rendering: Rendering) -> Found:
    if not rendering.selected(resource["spec"]["selector"]):
        yield "spec.selector", "selects no pod"


def _pod_monitor(resource: Resource, rendering: Rendering) -> Found:
    pods = rendering.selected(resource["spec"]["selector"])
    if not pods:
        yield "spec.selector", "selects no pod"
    for i, endpoint in enumerate(resource["spec"]["podMetricsEndpoints"]):
        yield from _named_port(f"spec.podMetricsEndpoints.{i}.port", endpoint.get("port"), pods)
        if credentials := endpoint.get("authorization", {}).get("credentials"):
            yield from _secret_key(f"spec.podMetricsEndpoints.{i}.authorization.credentials", credentials, rendering)


def _network_policy(resource: Resource, rendering: Rendering) -> Found:
    spec = resource["spec"]
    own = rendering.selected(spec["podSelector"])
    if not own:
        yield "spec.podSelector", "selects no pod"
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        for i, rule in enumerate(spec.get(direction, ())):
            path = f"spec.{direction}.{i}"
            theirs: list[Pod] = []
            for j, peer in enumerate(rule.get(peers, ())):
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    theirs += (selected := rendering.selected(peer["podSelector"]))
                    if not selected:
                        yield f"{path}.{peers}.{j}.podSelector", "selects no pod"
            for j, port in enumerate(rule.get("ports", ())):
                yield from _named_port(
                    f"{path}.ports.{j}.port", port["port"], own if direction == "ingress" else theirs
                )


def _named_port(path: str, port: Any, pods: Sequence[Pod]) -> Found:
    """A named port must be one of every selected pod, or it would be open in some and not in others."""
    if isinstance(port, str) and any(port not in pod.ports for pod in pods):
        yield path, _no("port", port)


def _ingress(resource: Resource, rendering: Rendering) -> Found:
    for i, entry in enumerate(resource["spec"].get("tls", ())):
        if entry["secretName"] not in rendering.secrets:
            yield f"spec.tls.{i}.secretName", _no("secret", entry["secretName"])
    for path, key, value in walk(resource):
        if key == "service" and value["port"].get("number") not in rendering.services().get(value["name"], ()):
            yield path, _no("service with this port", f"{value['name']}:{value['port'].get('number')}")


def _certificate(resource: Resource, rendering: Rendering) -> Found:
    issuer = resource["spec"]["issuerRef"]
    if issuer["name"] not in rendering.names(issuer["kind"]):
        yield "spec.issuerRef", _no(issuer["kind"], issuer["name"])


def _issuer(resource: Resource, rendering: Rendering) -> Found:
    secret = resource["spec"].get("ca", {}).get("secretName")
    if secret and secret not in rendering.secrets:
        yield "spec.ca.secretName", _no("secret", secret)


BY_KIND = {
    "Service": _service,
    "PodDisruptionBudget": _disruption_budget,
    "PodMonitor": _pod_monitor,
    "NetworkPolicy": _network_policy,
    "Ingress": _ingress,
    "Certificate": _certificate,
    "Issuer": _issuer,
}


def _no(what: str, name: object) -> str:
    return f"there is no {what} {name} in this rendering, nor in k8s/secrets.yaml"
