"""The Kubernetes manifests: each overlay is valid as rendered, and what is wrong is named."""

import copy
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from actors.names import CONTROLLER, ROUTER, expert_names, metrics_port, router_names
from actors.serve_app import Arguments
from moecluster import __version__
from moecluster.config import Config, read_config
from tools.generate_prometheus_rule import RESOURCE, prometheus_rule
from tools.manifests.kustomize import Resource, containers_in, twin
from tools.manifests.resources import pods_of, walk
from tools.manifests.schemas import Schemas, is_custom
from tools.validate_manifests import CRDS_VARIABLE, ROOT, main, overlays, problems_of

CONFIG = "/etc/moecluster/config"

needs_crds = pytest.mark.skipif(CRDS_VARIABLE not in os.environ, reason=f"{CRDS_VARIABLE} names no folder of CRDs")


def of(kind: str, resources: list[Resource], name: str = "") -> Resource:
    (found,) = [r for r in resources if r["kind"] == kind and name in ("", r["metadata"]["name"])]
    return found


@cache
def rendered(overlay: str) -> list[Resource]:
    return twin(ROOT / "k8s" / overlay)


@cache
def schemas() -> Schemas:
    return Schemas.read(Path(os.environ[CRDS_VARIABLE])) if CRDS_VARIABLE in os.environ else Schemas()


def configs(resources: list[Resource]) -> dict[str, Config]:
    data = of("ConfigMap", resources, "moecluster")["data"]
    return {name: read_config(tomllib.loads(text), source=name) for name, text in data.items()}


ALL = [str(folder.relative_to(ROOT / "k8s")) for folder in overlays()]


@pytest.mark.parametrize("overlay", ALL)
def test_an_overlay_is_valid(overlay: str) -> None:
    assert problems_of(rendered(overlay), schemas()) == []


@needs_crds
@pytest.mark.parametrize("overlay", ALL)
def test_custom_resources_are_validated_by_the_schemas_of_their_crds(overlay: str) -> None:
    custom = [r for r in rendered(overlay) if is_custom(r["apiVersion"])]
    left_out = {r["kind"] for r in custom if not schemas().has(r)}
    assert {r["kind"] for r in custom} & {"RayCluster", "RayService", "RayJob"}
    assert left_out <= {"Certificate", "Issuer"}  # cert-manager's


def test_overlays_have_one_ray_resource_each() -> None:
    kinds = {overlay: [r["kind"] for r in rendered(overlay) if r["kind"].startswith("Ray")] for overlay in ALL}
    assert kinds == {
        "base": ["RayCluster"],
        "overlays/cert-manager": ["RayService"],
        "overlays/dev": ["RayService"],
        "overlays/gpu": ["RayService"],
        "overlays/serve": ["RayService"],
        "overlays/train": ["RayJob"],
    }


@pytest.mark.parametrize("overlay", ALL)
def test_settings_are_those_of_moecluster_and_their_ports_are_declared(overlay: str) -> None:
    pods = [pod for r in rendered(overlay) if r["kind"].startswith("Ray") for pod in pods_of(r)]
    ray = [pod for pod in pods if "ray-" in pod.labels["app.kubernetes.io/component"]]
    declared = [{port for name, port in pod.ports.items() if name.startswith("moe-")} for pod in ray]
    for config in configs(rendered(overlay)).values():
        experts = max(config.controller.max_expert_actors, config.cluster.num_expert_actors)
        routers = max(config.serve.max_routers, config.cluster.num_routers)
        actors = {*expert_names(config), *router_names(config), CONTROLLER}
        actors |= {f"expert-{i}" for i in range(experts)} | {f"{ROUTER}-{i}" for i in range(1, routers)}
        used = {metrics_port(config, actor) for actor in actors}
        assert all(used <= ports for ports in declared)


@pytest.mark.parametrize("overlay", ALL)
def test_the_first_actors_have_room_in_the_smallest_number_of_pods(overlay: str) -> None:
    resource = next(r for r in rendered(overlay) if r["kind"].startswith("Ray"))
    spec = resource["spec"].get("rayClusterConfig") or resource["spec"].get("rayClusterSpec") or resource["spec"]
    cpus = gpus = 0.0
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        cpus += group["minReplicas"] * float(limits["cpu"])
        gpus += group["minReplicas"] * float(limits.get("nvidia.com/gpu", 0))
    for config in configs(rendered(overlay)).values():
        cluster, gateways = config.cluster, 1.0  # two gateways of half a CPU
        needed = cluster.num_expert_actors * cluster.cpus_per_expert_actor + gateways
        needed += cluster.num_routers * cluster.cpus_per_router
        assert needed <= cpus
        assert cluster.num_routers * cluster.gpus_per_router <= gpus


def test_ray_serve_accepts_the_configuration_and_the_application_its_arguments() -> None:
    for overlay in ALL:
        for service in (r for r in rendered(overlay) if r["kind"] == "RayService"):
            config = ServeDeploySchema(**yaml.safe_load(service["spec"]["serveConfigV2"]))
            (application,) = config.applications
            assert application.import_path == "actors.serve_app:build"
            arguments = Arguments(**application.args)
            folder, _, name = arguments.target.rpartition("/")
            assert folder == CONFIG and name in of("ConfigMap", rendered(overlay), "moecluster")["data"]


def test_paths_in_settings_are_mounted_in_every_ray_pod() -> None:
    for overlay in ALL:
        settings = [config.security for config in configs(rendered(overlay)).values()]
        assert all(security.tls_dir for security in settings)
        wanted = {security.tls_dir for security in settings}
        wanted |= {security.api_keys_file.rpartition("/")[0] for security in settings} - {""}
        for resource in (r for r in rendered(overlay) if r["kind"].startswith("Ray")):
            for pod in pods_of(resource):
                if pod.labels["app.kubernetes.io/component"].startswith("ray-"):
                    mounts = {mount["mountPath"] for mount in pod.spec["containers"][0]["volumeMounts"]}
                    assert wanted | {CONFIG, "/tmp", "/models"} <= mounts


def test_images_have_the_version_of_the_package_and_ray_that_of_the_constraints() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for overlay in ALL:
        images = {c["image"] for r in rendered(overlay) for c in containers_in(r)}
        ours = {image for image in images if image.startswith("moecluster")}
        assert ours and {image.partition(":")[2] for image in ours} == {__version__}
        versions = [value for r in rendered(overlay) for _, key, value in walk(r) if key == "rayVersion"]
        assert versions == [pins["ray"]]


def test_the_group_with_gpus_has_what_the_other_has() -> None:
    resource = of("RayService", rendered("overlays/gpu"))
    cpu, gpu = copy.deepcopy(resource["spec"]["rayClusterConfig"]["workerGroupSpecs"])
    assert gpu["template"]["spec"].pop("tolerations")
    for group in (cpu, gpu):
        (container,) = group["template"]["spec"]["containers"]
        del container["resources"], container["image"]
        for key in ("groupName", "replicas", "minReplicas", "maxReplicas"):
            del group[key]
    assert gpu == cpu


def test_a_pod_outlives_the_drain_of_its_node() -> None:
    for overlay in ALL:
        workers = [p for r in rendered(overlay) for p in pods_of(r) if _component(p.labels) == "ray-worker"]
        assert workers
        for pod in workers:
            (drain,) = [e["value"] for e in pod.spec["containers"][0]["env"] if e["name"].endswith("DRAIN_TIMEOUT_S")]
            assert float(drain) < pod.spec["terminationGracePeriodSeconds"]


def _component(labels: Any) -> str:
    return str(labels.get("app.kubernetes.io/component", ""))


def ray_container(resources: list[Resource]) -> Any:
    return of("RayCluster", resources)["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]


def redis(resources: list[Resource]) -> Any:
    return of("StatefulSet", resources)["spec"]["template"]["spec"]


def plain_secret(resources: list[Resource]) -> None:
    resources.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"password": "x"}})


WRONG: list[tuple[str, str, Callable[[Any], object], str]] = [
    (
        "a field that Kubernetes does not have", "overlays/serve",
        lambda r: redis(r).update(restartPolcy="Always"),
        r"StatefulSet moecluster-redis: spec\.template\.spec: .*restartPolcy",
    ),
    (
        "a wrong type", "overlays/serve",
        lambda r: of("StatefulSet", r)["spec"].update(replicas="one"),
        r"StatefulSet moecluster-redis: spec\.replicas: 'one'",
    ),
    (
        "a kind that its group does not have", "base",
        lambda r: of("Namespace", r).update(kind="Nmespace"), "Nmespace moecluster: apiVersion: Kubernetes .* has no",
    ),
    (
        "a secret that nobody creates", "base",
        lambda r: of("RayCluster", r)["spec"]["authOptions"].update(secretName="none"),
        r"RayCluster moecluster: spec\.authOptions: there is no key in a secret none/auth_token",
    ),
    (
        "a config map that is not there", "base",
        lambda r: r.remove(of("ConfigMap", r)),
        r"RayCluster moecluster: spec\.headGroupSpec\..*\.volumes\.3\.configMap\.name: there is no config map",
    ),
    (
        "a volume that is not there", "base",
        lambda r: ray_container(r)["volumeMounts"].append({"name": "cache", "mountPath": "/cache"}),
        r"RayCluster moecluster: spec\..*\.volumeMounts\.7\.name: there is no volume cache",
    ),
    (
        "a port that pods do not have", "overlays/serve",
        lambda r: of("PodMonitor", r, "moecluster-ray-head")["spec"]["podMetricsEndpoints"][0].update(port="metric"),
        r"PodMonitor moecluster-ray-head: spec\.podMetricsEndpoints\.0\.port: there is no port metric",
    ),
    (
        "labels that no pod has", "base",
        lambda r: of("NetworkPolicy", r, "ray")["spec"]["podSelector"]["matchLabels"].update(x="y"),
        r"NetworkPolicy ray: spec\.podSelector: selects no pod",
    ),
    (
        "an issuer that is not there", "overlays/cert-manager",
        lambda r: of("Certificate", r, "moecluster-tls")["spec"]["issuerRef"].update(name="none"),
        r"Certificate moecluster-tls: spec\.issuerRef: there is no Issuer none",
    ),
    ("a secret in plain text", "base", plain_secret, "Secret s: stringData: a secret in plain text"),
    (
        "a password as the value of a variable", "base",
        lambda r: ray_container(r)["env"].append({"name": "REDIS_PASSWORD", "value": "x"}),
        r"RayCluster moecluster: spec\..*\.env\.5\.value: REDIS_PASSWORD in plain text",
    ),
    (
        "redis's password in plain text", "overlays/serve",
        lambda r: of("RayService", r)["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"].update(
            redisPassword={"value": "x"}
        ),
        r"RayService moecluster: spec\..*\.redisPassword\.value: a secret in plain text",
    ),
    (
        "a container as root", "overlays/serve",
        lambda r: redis(r)["containers"][0]["securityContext"].update(runAsUser=0),
        r"StatefulSet moecluster-redis: spec\.template\.spec\.containers\.0\.securityContext: .* root",
    ),
    (
        "a pod that may run as root", "base",
        lambda r: of("RayCluster", r)["spec"]["headGroupSpec"]["template"]["spec"].pop("securityContext"),
        r"RayCluster moecluster: spec\.headGroupSpec\.template\.spec\.securityContext\.runAsNonRoot: expected true",
    ),
    (
        "a root file system that can be written", "base",
        lambda r: ray_container(r)["securityContext"].update(readOnlyRootFilesystem=False),
        r"RayCluster moecluster: .*readOnlyRootFilesystem: expected true",
    ),
    (
        "an autoscaler with more rights", "base",
        lambda r: of("RayCluster", r)["spec"]["autoscalerOptions"].pop("securityContext"),
        r"RayCluster moecluster: spec\.autoscalerOptions\.securityContext\.allowPrivilegeEscalation: expected false",
    ),
    (
        "no limit of memory", "base",
        lambda r: ray_container(r)["resources"]["limits"].pop("memory"),
        r"RayCluster moecluster: spec\..*\.resources\.limits\.memory: missing",
    ),
    (
        "an image without a tag", "base",
        lambda r: ray_container(r).update(image="moecluster"),
        r"RayCluster moecluster: .*\.image: moecluster: expected a tag",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("overlay", "spoil", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_is_wrong_is_named_with_kind_and_field(
    overlay: str, spoil: Callable[[list[Resource]], object], message: str
) -> None:
    resources = copy.deepcopy(rendered(overlay))
    spoil(resources)
    found = problems_of(resources, schemas())
    assert found
    assert any(re.match(message, line) for line in found), found


@needs_crds
def test_a_wrong_custom_resource_is_named_with_kind_and_field() -> None:
    resources = copy.deepcopy(rendered("overlays/serve"))
    service = of("RayService", resources)["spec"]
    service["rayClusterConfig"]["workerGroupSpecs"][0]["minReplcas"] = 1
    service["rayClusterConfig"]["autoscalerOptions"]["version"] = "v3"
    found = "\n".join(problems_of(resources, schemas()))
    assert "RayService moecluster: spec.rayClusterConfig.workerGroupSpecs.0: " in found and "minReplcas" in found
    assert "RayService moecluster: spec.rayClusterConfig.autoscalerOptions.version: 'v3'" in found


def test_the_command_names_the_folder_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [map.yaml]\n"
    )
    resource = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"a": "b"}, "dta": {}}
    (tmp_path / "map.yaml").write_text(yaml.safe_dump(resource))
    assert main([tmp_path]) == 1
    assert f"{tmp_path}: ConfigMap a: (top): " in capsys.readouterr().err


def test_alerts_are_about_metrics_that_there_are() -> None:
    known = set(re.findall(r"`(moecluster_\w+)`", (ROOT / "docs" / "metrics.md").read_text()))
    groups = of("PrometheusRule", rendered("overlays/serve"))["spec"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    named = {name for rule in rules for name in re.findall(r"[\w:]*moecluster_[\w:]+", rule["expr"])} - recorded
    assert recorded and {name.removesuffix("_bucket") for name in named} <= known


def test_the_operators_rules_are_those_of_a_prometheus_without_it() -> None:
    ours = yaml.safe_load((ROOT / "clusters" / "prometheus-rules.yml").read_text())
    assert of("PrometheusRule", rendered("overlays/serve"))["spec"] == ours
    assert RESOURCE.read_text() == prometheus_rule(), "stale: make docs"


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not on PATH (make system-deps)")
def test_promtool_accepts_the_alerts(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(of("PrometheusRule", rendered("overlays/serve"))["spec"]))
    done = subprocess.run(["promtool", "check", "rules", "rules.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
