"""Ten thousand malformed requests in a row: no mistake of the gateway's own, and no memory that grows with them."""

import psutil

from tests.support.clusters.running_gateway import running_gateway
from tests.support.fakes.fake_router import FakeRouter
from tests.support.malformed.malformed_http import send_bad_requests

REQUESTS = 10_000
MAX_GROWTH_BYTES = 64 * 2**20  # of the whole process, the client and the router in it


def test_ten_thousand_malformed_requests() -> None:
    with FakeRouter() as router, running_gateway([router.address]) as gateway:
        send_bad_requests(gateway.url, REQUESTS // 10, seed=1)
        before_bytes = psutil.Process().memory_info().rss
        router.requests.clear()
        seen = send_bad_requests(gateway.url, REQUESTS, seed=2)
        router.requests.clear()
        grown_bytes = psutil.Process().memory_info().rss - before_bytes
    print(f"{REQUESTS} requests: {dict(sorted(seen.items()))}, {grown_bytes / 2**20:.1f} MB more")
    assert set(seen) <= {200, 400, 404, 405}
    assert grown_bytes < MAX_GROWTH_BYTES
