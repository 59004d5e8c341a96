"""Checks GPUs: the driver, torch's build, and every device with its memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from moecluster.cli.commands.doctor.finding import Check, Finding, ok, problem, warning
from moecluster.cli.common.formatting import shown_bytes
from moecluster.config import Config

# What a driver leaves on the host: NVIDIA's, also in a container; Windows' own; AMD's.
DRIVERS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
NO_GPUS = "set cluster.gpus_per_router and cluster.gpus_per_expert_actor to 0"
TIMEOUT_S = 300.0  # torch's import, and the first use of a device, on a busy machine
# In a process of its own: a driver that hangs or crashes must not take the doctor with it.
SCRIPT = """
import json, warnings
import torch
cuda, rocm = torch.version.cuda, torch.version.hip
build = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else None
found = {"torch": torch.__version__, "build": build, "devices": [], "error": ""}
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    try:
        for number in range(torch.cuda.device_count() if build else 0):
            about = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            ones = torch.ones(64, 64, device=f"cuda:{number}")
            assert float((ones @ ones).sum()) == 64**3
            found["devices"].append({"name": about.name, "free": free, "total": total})
    except Exception as exc:
        found["error"] = str(exc).splitlines()[0] if str(exc) else repr(exc)
    if not found["devices"] and not found["error"] and said:
        found["error"] = str(said[0].message).splitlines()[0]
print(json.dumps(found))
"""


def gpus(config: Config) -> Finding:
    """The devices that torch can use, against those that the actors reserve."""
    if not any(Path(driver).exists() for driver in DRIVERS):
        if reserved := _reserved(config):
            return problem(f"no driver of a GPU; the actors reserve {reserved:g} GPUs", NO_GPUS)
        return ok("no driver of a GPU; everything computes on the CPU")
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, OSError, ValueError, IndexError) as exc:
        return warning(f"torch does not say which devices there are ({type(exc).__name__})", "see the check of torch")
    return judge(config, found)


def judge(config: Config, found: dict[str, Any]) -> Finding:
    """Judges what torch said beside a driver. found: torch's version, what it is built for (None: CPUs only), devices
    and error."""
    reserved = _reserved(config)
    missing = f"; the actors reserve {reserved:g} GPUs" if reserved else ""
    report = problem if missing else warning
    if not found["build"]:
        return report(
            f"a GPU's driver is there, and torch {found['torch']} is a build for CPUs{missing}",
            "install torch's build for this GPU",
        )
    if found["error"]:
        return report(f"torch {found['torch']} cannot use the GPU: {found['error']}{missing}", "see docs/gpu.md")
    devices = found["devices"]
    if not devices:
        if missing:
            return problem(f"torch finds no GPU{missing}", f"look at CUDA_VISIBLE_DEVICES, or {NO_GPUS}")
        return ok("torch finds no GPU; everything computes on the CPU")
    names = "; ".join(f"{d['name']}, {shown_bytes(d['free'])} of {shown_bytes(d['total'])} free" for d in devices)
    if reserved > len(devices):
        return problem(f"{names}{missing}", "lower cluster.gpus_per_router and cluster.gpus_per_expert_actor")
    return ok(f"{names} ({found['build']})")


def _reserved(config: Config) -> float:
    """Returns how many GPUs of this host the actors reserve; 0 for a cluster on another Ray."""
    cluster = config.cluster
    if cluster.address:
        return 0.0
    return cluster.num_expert_actors * cluster.gpus_per_expert_actor + cluster.num_routers * cluster.gpus_per_router


CHECKS = (Check(name="GPUs", run=gpus),)
