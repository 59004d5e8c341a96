"""Sends an HTTP request as another user of this host; only root can."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.clusters.second_user import NOBODY

SCRIPT = """
import encodings.idna, http.client, json, os, sys
asked = json.load(sys.stdin)
os.setgroups([])
os.setresgid(asked["uid"], asked["uid"], asked["uid"])
os.setresuid(asked["uid"], asked["uid"], asked["uid"])
connection = http.client.HTTPConnection(asked["address"], timeout=60)
connection.request(asked["method"], asked["path"], body=asked["body"], headers=asked["headers"])
answer = connection.getresponse()
print(json.dumps([answer.status, answer.read().decode()]))
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def request_as_another_user(
    address: str, method: str, path: str, *, body: str = "", headers: dict[str, str] | None = None
) -> tuple[int, str]:
    """Returns (status, body) of a request to host:port by a user whom nothing here belongs to."""
    asked = {
        "uid": NOBODY, "address": address, "method": method, "path": path, "body": body, "headers": headers or {}
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=json.dumps(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    status, text = json.loads(done.stdout)
    return int(status), str(text)
