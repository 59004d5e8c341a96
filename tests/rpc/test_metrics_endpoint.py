import urllib.request

import pytest

from moecluster.errors import ResourceError
from moecluster.metrics import Metrics


def test_metrics_are_served_on_a_free_port_and_gone_after_close() -> None:
    metrics = Metrics(model="m")
    metrics.set_generation(7)
    port = metrics.serve(host="127.0.0.1", port=0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        assert 'moecluster_placement_generation{model="m"} 7.0' in answer.read().decode()
    metrics.close()
    metrics.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)


def test_a_port_in_use_is_a_users_error_that_names_it() -> None:
    first, second = Metrics(model="m"), Metrics(model="m")
    port = first.serve(host="127.0.0.1", port=0)
    try:
        with pytest.raises(ResourceError, match=rf"127\.0\.0\.1:{port}.*in use.*cluster\.metrics_port"):
            second.serve(host="127.0.0.1", port=port)
    finally:
        first.close()
