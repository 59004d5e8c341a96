"""The Prometheus client against real HTTP servers that are down, slow, or not Prometheus."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from moecluster.controller.load.prometheus import PrometheusLoadSource
from moecluster.controller.load.prometheus_client import PrometheusServer, Sample
from moecluster.errors import ConfigError, DeadlineExceeded, InvalidMessage, MoeClusterError, Unavailable

TIMEOUT_S = 0.5
POLL_S = 0.01  # of a server that is told to stop
NOW_S = 1_700_000_000.0

Answer = Callable[[BaseHTTPRequestHandler], None]
Serve = Callable[[Answer], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server that answers every GET in one way; returns its address."""
    servers: list[ThreadingHTTPServer] = []

    def serve(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            def log_message(self, *args: object) -> None:
                """Logs nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(POLL_S,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def answering(body: bytes, status: int = 200) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def vector(*results: object) -> bytes:
    return json.dumps({"status": "success", "data": {"resultType": "vector", "result": results}}).encode()


def series(name: str, value: float, **labels: str) -> dict[str, object]:
    return {
        "metric": {"__name__": name, "instance": "h:1", "model": "served", "cluster": "m", **labels},
        "value": [NOW_S, str(value)],
    }


def query(address: str) -> tuple[Sample, ...]:
    return PrometheusServer(address, timeout_s=TIMEOUT_S).query("up")


def source(address: str, **options: float) -> PrometheusLoadSource:
    return PrometheusLoadSource(address, cluster="m", layer_experts={0: 2}, timeout_s=TIMEOUT_S, **options)


@pytest.mark.parametrize(
    "address",
    [
        "", "localhost:9090", "ftp://h:9090", "http://", "http://:9090", "http://h:port", "http://h:99999", "http://h:0",
        "http://[::1", "http://h:9090?x=1", "http://h:9090#x", "http://h 1:9090", "http://h\n:9090", "http://a..b:9090",
        "http://user:word@h:9090",
    ],
)  # fmt: skip
def test_what_is_no_address_is_the_users_error(address: str) -> None:
    with pytest.raises(ConfigError, match=r"controller\.prometheus_address: .*, expected http://host:port"):
        PrometheusServer(address, timeout_s=TIMEOUT_S)


def test_an_answer_is_read_with_labels_time_and_value(serve: Serve) -> None:
    address = serve(answering(vector({"metric": {"a": "1"}, "value": [NOW_S, "+Inf"]})))
    assert query(address + "/") == (Sample(labels={"a": "1"}, time_s=NOW_S, value=float("inf")),)


def test_a_path_prefix_and_the_query_reach_the_server(serve: Serve) -> None:
    paths: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        paths.append(handler.path)
        answering(vector())(handler)

    server = PrometheusServer(serve(answer) + "/prefix", timeout_s=TIMEOUT_S)
    assert server.query('up{a="b&c"}', at_s=12.5) == ()
    assert paths == ["/prefix/api/v1/query?query=up%7Ba%3D%22b%26c%22%7D&time=12.5"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"<html>hello</html>", b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b'{"status": "success"}',
        b'{"status": "success", "data": {"resultType": "matrix", "result": []}}',
        b'{"status": "success", "data": {"resultType": "vector", "result": {}}}',
        b'{"status": "error", "data": {"resultType": "vector", "result": []}}',
        vector(7), vector({}), vector({"metric": [], "value": [1, "1"]}),
        vector({"metric": {"a": 1}, "value": [1, "1"]}), vector({"metric": {}}),
        vector({"metric": {}, "value": [1]}), vector({"metric": {}, "value": ["1", "1"]}),
        vector({"metric": {}, "value": [1, 1]}), vector({"metric": {}, "value": [1, "one"]}),
        vector({"metric": {}, "value": [True, "1"]}), vector({"metric": {}, "value": [1, None]}),
        vector({"metric": {}, "value": [10**400, "1"]}), vector({"metric": {}, "value": [float("nan"), "1"]}),
    ],
)  # fmt: skip
def test_rubbish_is_refused_by_name(serve: Serve, body: bytes) -> None:
    address = serve(answering(body))
    with pytest.raises(InvalidMessage, match=f"{address} does not answer as Prometheus does: ") as caught:
        query(address)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_refusal_is_told_in_the_servers_words(serve: Serve) -> None:
    words = b'{"status": "error", "errorType": "timeout", "error": "query timed out"}'
    with pytest.raises(Unavailable, match="refuses: 503 query timed out"):
        query(serve(answering(words, 503)))
    with pytest.raises(Unavailable, match="refuses: 404 Not Found"):
        query(serve(answering(b"<html>", 404)))


def test_a_server_that_is_away_is_unavailable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        with pytest.raises(Unavailable, match="cannot be reached"):
            query(f"http://127.0.0.1:{taken.getsockname()[1]}")


def test_a_server_that_hangs_up_is_unavailable(serve: Serve) -> None:
    with pytest.raises(Unavailable, match="broke off"):
        query(serve(lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)))


@pytest.mark.parametrize("pause_s", [3 * TIMEOUT_S, TIMEOUT_S / 5])
def test_a_server_that_is_silent_or_slow_meets_the_deadline(serve: Serve, pause_s: float) -> None:
    ended = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        while not ended.wait(pause_s):
            handler.wfile.write(b" ")

    began_s = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"did not answer within 0\.5 s"):
        query(serve(answer))
    ended.set()
    assert time.monotonic() - began_s < 10 * TIMEOUT_S


STARTED = series("moecluster_start_time_seconds", NOW_S - 100)
SCRAPED = {"metric": {"instance": "h:1", "model": "served", "cluster": "m"}, "value": [NOW_S, str(NOW_S - 1)]}


def cluster(scraped: object, *counters: object) -> Answer:
    """Prometheus' answers to the queries of a load source."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        answering(vector(scraped) if "timestamp" in handler.path else vector(*counters))(handler)

    return answer


def tokens(expert: str, value: float, layer: str = "0") -> dict[str, object]:
    return series("moecluster_replica_tokens_total", value, layer=layer, expert=expert, actor="a")


HIDDEN = series("moecluster_hidden_replicas", 3, actor="a")


def test_series_of_the_model_are_a_reading(serve: Serve) -> None:
    reading = source(serve(cluster(SCRAPED, STARTED, tokens("0", 5), tokens("1", 7)))).read(50.0)
    assert reading.counters.now_s == pytest.approx(49.0)
    assert {r: {n: t.tolist() for n, t in layers.items()} for r, layers in reading.counters.tokens.items()} == {
        "instance=h:1": {0: [5, 7]}
    }
    assert reading.work == {}


@pytest.mark.parametrize(
    ("counters", "error", "message"),
    [
        ([STARTED, tokens("0", 5), HIDDEN], ConfigError, "all of its 4 replicas.*max_expert_series to at least 4"),
        ([STARTED, tokens("0", 5), tokens("2", 5)], InvalidMessage, "expert 0/2, which the model does not have"),
        ([STARTED, tokens("0", 5, layer="3")], InvalidMessage, "expert 3/0, which"),
        ([STARTED, tokens("0", 5, layer="-1")], InvalidMessage, "layer '-1', expected a number"),
        ([STARTED, tokens("0", 5, layer="")], InvalidMessage, "without the label layer"),
        ([STARTED, tokens("0", -5)], InvalidMessage, "-5.0, expected a count"),
        ([STARTED, tokens("0", float("nan"))], InvalidMessage, "nan, expected a count"),
        ([tokens("0", 5), tokens("1", 7)], InvalidMessage, "without moecluster_start_time_seconds"),
        ([STARTED, series("up", 1)], InvalidMessage, "'up', which was not asked for"),
        ([STARTED, series("moecluster_actor_tokens_total", 1)], InvalidMessage, "without the label actor"),
    ],
)
def test_series_that_do_not_fit_the_model_are_refused(
    serve: Serve, counters: list[object], error: type[MoeClusterError], message: str
) -> None:
    with pytest.raises(error, match=message):
        source(serve(cluster(SCRAPED, *counters))).read(0.0)


def test_series_that_nobody_scrapes_any_more_are_not_planned_by(serve: Serve) -> None:
    address = serve(cluster(SCRAPED, STARTED, tokens("0", 5), tokens("1", 7)))
    assert source(address, max_age_s=2.0).read(0.0).counters.tokens
    with pytest.raises(Unavailable, match=r"last scraped cluster 'm' 1 s ago, .* older than 0\.5 s"):
        source(address, max_age_s=0.5).read(0.0)
