"""Checks environment variables that are known to spoil a cluster."""

import os
from collections.abc import Iterator, Mapping

from moecluster.cli.commands.doctor.finding import Check, Finding, ok, warning
from moecluster.config import Config

# They pin the threads of every process to the same cores.
PINNING = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")
PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
LOCAL = ("localhost", "127.0.0.1")


def variables(config: Config) -> Finding:
    """The variables of this shell, which all processes of a local cluster inherit."""
    found = list(_suspects(config, os.environ))
    if not found:
        return ok("none that is known to spoil a cluster")
    return warning("; ".join(what for what, _ in found), "; ".join(advice for _, advice in found))


def _suspects(config: Config, given: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yields (what is set, what to do)."""
    if "RAY_ADDRESS" in given and not config.cluster.address:
        yield (
            f"RAY_ADDRESS={given['RAY_ADDRESS']}, and moecluster starts a Ray of its own",
            "to use that Ray, set cluster.address",
        )
    if "RAY_AUTH_TOKEN" in given and not config.cluster.address:
        yield (
            "RAY_AUTH_TOKEN takes the place of the token that moecluster makes",
            "unset RAY_AUTH_TOKEN: a shell without it could not reach the cluster's Ray",
        )
    if given.get("RAY_USE_TLS", "0") == "1" and not config.cluster.address:
        yield "RAY_USE_TLS=1", "unset RAY_USE_TLS: a local Ray listens on the loopback only"
    if _float_of(given.get("RAY_worker_niceness", "0")) > 0:
        yield "RAY_worker_niceness lowers the priority of all actors", "unset RAY_worker_niceness"
    for name in PINNING:
        if given.get(name, "").lower() not in ("", "false"):
            yield f"{name}={given[name]} pins the threads of all processes to the same cores", f"unset {name}"
    proxies = [name for name in PROXIES if given.get(name)]
    exempt = given.get("no_proxy") or given.get("NO_PROXY") or ""
    if proxies and exempt != "*" and not any(host in exempt.split(",") for host in LOCAL):
        yield (
            f"{', '.join(proxies)} without no_proxy for this host",
            "HTTP clients would ask the proxy for the gateway: set no_proxy=localhost,127.0.0.1",
        )
    if given.get("PYTHONDONTWRITEBYTECODE"):
        yield (
            "PYTHONDONTWRITEBYTECODE makes every process compile what it imports, for seconds",
            "unset PYTHONDONTWRITEBYTECODE",
        )


def _float_of(text: str) -> float:
    """Returns the number of a text; 0 if it is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


CHECKS = (Check(name="variables", run=variables),)
