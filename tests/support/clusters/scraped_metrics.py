"""Reads /metrics of a process, as Prometheus does."""

import ssl
from pathlib import Path

import httpx

from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.tls.material import NAME
from tests.support.waiting import WAIT_S


def scrape(
    address: str, credentials: ClusterCredentials | None = None, *, tls_dir: str = "", path: str = "/metrics"
) -> httpx.Response:
    """Returns the answer of host:port to GET of a path, whatever its status. credentials: sent as the bearer, over TLS
    if they have a tls_dir. tls_dir: for TLS without credentials."""
    headers = {} if credentials is None else {"Authorization": f"Bearer {credentials.bearer}"}
    folder = tls_dir or (credentials.tls_dir if credentials is not None else "")
    if not folder:
        return httpx.get(f"http://{address}{path}", headers=headers, timeout=WAIT_S)
    context = ssl.create_default_context(cafile=str(Path(folder) / "ca.crt"))
    with httpx.Client(verify=context, timeout=WAIT_S) as client:
        return client.get(f"https://{address}{path}", headers=headers, extensions={"sni_hostname": NAME})


def metrics_of(address: str, credentials: ClusterCredentials | None = None) -> str:
    """Returns the page; fails if it is refused."""
    answer = scrape(address, credentials)
    assert answer.status_code == 200, answer.text
    return answer.text
