"""A model that a lab's hosts serve as a job, what it must answer, and clients of it on `control`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM

from moecluster.models.native.build import register_native_family
from moecluster.models.tokenizer.load import load_tokenizer
from tests.support.hosts.http_clients import ClientsIn, Load, once
from tests.support.hosts.lab import ADDRESSES
from tests.support.hosts.ray_up import RayOnHosts, wait_for
from tests.support.soak.generation_load import save_decided_model
from tests.support.soak.http_load import StreamedRequest, assert_all_right, clear_texts

NEW_TOKENS = 30
NUM_PROMPTS = 6
CANDIDATES = [f"{word} {number}" for number in range(20) for word in ("The tower", "import os", "class Cat")]
URL = f"http://{ADDRESSES['head']}:8000"
JOB = "serving"
# Two such clusters fit on one host with two cores, when the others are gone.
CLUSTER = (
    *("--set", "cluster.port_range=20000-20999", "--set", "cluster.num_expert_actors=3"),
    *("--set", "cluster.cpus_per_expert_actor=0.25", "--set", "cluster.cpus_per_router=0.25"),
    *("--set", "security.tls_dir=~/moecluster/tls"),
)
SERVING = (
    *("--host", "0.0.0.0", "--set", "security.allow_without_keys=true", "--set", "security.allow_plaintext=true"),
    *("--set", "controller.num_redundant_experts=4"),
)


@dataclass(frozen=True, kw_only=True)
class ServingJob:
    """A job that serves, and its answers on a good network."""

    hosts: RayOnHosts
    greedy: Mapping[str, str]
    sampled: Mapping[str, str]

    def clients(self, number: int) -> ClientsIn:
        """Returns clients on `control`, which stream requests while they are entered."""
        return ClientsIn(self.hosts.lab.control, _load(list(self.greedy), number))

    def check(self, texts: Sequence[StreamedRequest]) -> None:
        """Asserts that no request failed, and every answer is the expected one."""
        assert_all_right(texts, self.greedy, self.sampled, NEW_TOKENS)

    def experts(self) -> dict[str, int]:
        """Returns host -> number of experts that its actors hold."""
        status = json.loads(self.hosts.lab.ssh("head", "moecluster status --json", timeout_s=60.0))
        found: dict[str, int] = {}
        for actor in status["controller"]["actors"]:
            host = actor["address"].rpartition(":")[0]
            found[host] = found.get(host, 0) + actor["experts"]
        return {host: experts for host, experts in found.items() if experts}


def serve_on(hosts: RayOnHosts, folder: Path) -> ServingJob:
    """Submits a serving job, and waits until it serves. Its model is on the head alone; the others stream it."""
    model = Path(save_decided_model(folder / "tiny"))
    register_native_family()
    whole = AutoModelForCausalLM.from_pretrained(model)
    greedy = clear_texts(whole, load_tokenizer(model), CANDIDATES, NEW_TOKENS, NUM_PROMPTS)
    control = hosts.lab.control
    control.run("ray", "rsync-up", "onprem.yaml", f"{model}/", "/root/tiny/", timeout_s=120.0)
    hosts.moecluster("submit", "--no-wait", "--id", JOB, "serve", "/root/tiny", *SERVING, *CLUSTER)
    wait_for(lambda: "until Ctrl-C" in hosts.running_log_of(JOB), "the model is served", timeout_s=400.0)
    return ServingJob(hosts=hosts, greedy=greedy, sampled=once(control, _load(list(greedy), 1)))


def _load(prompts: Sequence[str], clients: int) -> Load:
    return Load(url=URL, model="tiny", prompts=prompts, clients=clients, new_tokens=NEW_TOKENS)
