"""A router's link to the controller: receives placements, renews the lease with the router's state, and reports
failures, loads and wanted experts."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc

from moecluster.errors import DeadlineExceeded, MoeClusterError
from moecluster.proto import controller_pb2
from moecluster.proto.controller_pb2_grpc import ControllerServiceStub
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.rpc.controller.load_messages import encode_load
from moecluster.rpc.controller.placement_messages import decode_placement
from moecluster.rpc.controller.status_messages import encode_router_state
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.fields import MAX_REASON_LENGTH, encode_expert
from moecluster.rpc.server import open_channel
from moecluster.rpc.status_codes import from_rpc_error
from moecluster.types import NO_PLACEMENT, ExpertId, LoadSnapshot, Placement, PlacementNumber, RouterState

logger = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 3
FIRST_RENEWAL_S = 1.0  # before the lease is known
STATE_PERIOD_S = 0.25  # between checks of the router's own state; a change renews the lease at once
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0
REPORT_TIMEOUT_S = 2.0
MAX_REPORTS = 64  # in flight at once; more are dropped
WANT_AGAIN_S = 0.2  # before the same expert is requested again

Report = controller_pb2.FailureReport | controller_pb2.LoadReport | controller_pb2.WantRequest


class ControllerClient:
    """A ControllerLink and a PlacementHold over the controller's WatchPlacement stream.

    Reopens the stream when it breaks; the last placement stays in use meanwhile.
    """

    def __init__(
        self,
        *,
        router: str,
        resolve: Callable[[], str],
        state: Callable[[], RouterState] | None = None,
        credentials: ClusterCredentials | None = None,
    ) -> None:
        """resolve returns within seconds the controller's host:port, which may change, or raises Unavailable.

        state returns at once what this router reports with every renewal; by default only its name.
        """
        self.router = router
        self._state = state or (lambda: RouterState(router=router))
        self._reached = ""
        self._resolve = resolve
        self._credentials = credentials
        self._board = PlacementBoard()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._renew_s = FIRST_RENEWAL_S
        self._channel: grpc.Channel | None = None
        self._saying: set[grpc.Future[Any]] = set()
        self._hold = False
        self._wanted_s: dict[ExpertId, float] = {}  # when each was last requested
        self._applied: queue.SimpleQueue[None] = queue.SimpleQueue()  # an entry: renew at once
        self._thread = threading.Thread(target=self._run, name="controller-client", daemon=True)
        self._thread.start()

    @property
    def controller(self) -> str:
        """host:port of the controller that placements come from now; empty while none do."""
        return self._reached

    def current(self, timeout_s: float) -> Placement:
        """Returns the newest placement, waiting for the first one. Raises Unavailable after the timeout."""
        return self._board.current(timeout_s)

    def newer_than(self, number: PlacementNumber, timeout_s: float) -> Placement | None:
        """Waits for a placement with a higher number; None after the timeout."""
        return self._board.newer_than(number, timeout_s)

    def report_failure(self, actor: str, incarnation: str, reason: str) -> None:
        """Reports that an actor did not answer. Drops the report without a controller, which checks its actors
        itself."""
        report = controller_pb2.FailureReport(
            reporter=self.router, actor=actor, incarnation=incarnation, reason=reason[:MAX_REASON_LENGTH]
        )
        self._send_state("ReportFailure", report)

    def report_nonfinite(self, actor: str, incarnation: str, expert: ExpertId, placement: PlacementNumber) -> None:
        """Reports that a replica returned NaN or infinity. Drops the report without a controller: the next placement
        that names the replica has it tried again."""
        report = controller_pb2.FailureReport(
            reporter=self.router,
            actor=actor,
            incarnation=incarnation,
            nonfinite=[encode_expert(expert)],
            placement_term=placement.term,
            generation=placement.generation,
        )
        self._send_state("ReportFailure", report)

    def report_load(self, load: LoadSnapshot) -> None:
        """Reports what was counted in a window. Drops the report without a controller."""
        self._send_state("ReportLoad", encode_load(self.router, load))

    def want_experts(self, layer: int, experts: Sequence[int]) -> None:
        """Reports that tokens wait for experts without a replica. Drops the report without a controller: call again."""
        with self._lock:
            now_s = time.monotonic()
            wanted = [ExpertId(layer=layer, index=index) for index in experts]
            wanted = [expert for expert in wanted if now_s - self._wanted_s.get(expert, -WANT_AGAIN_S) >= WANT_AGAIN_S]
        request = controller_pb2.WantRequest(router=self.router, experts=[encode_expert(expert) for expert in wanted])
        if wanted and self._send_state("WantExperts", request):
            with self._lock:
                self._wanted_s.update(dict.fromkeys(wanted, now_s))

    def hold(self, timeout_s: float) -> None:
        """Asks with every renewal that the placement be held; returns once a held placement has come.

        Raises DeadlineExceeded if none comes in time, and releases the hold.
        """
        self._hold = True
        self._applied.put(None)
        deadline_s = time.monotonic() + timeout_s
        placement = self._board.newer_than(NO_PLACEMENT, timeout_s)
        while placement is not None and not placement.held:
            placement = self._board.newer_than(placement.number, max(deadline_s - time.monotonic(), 0.0))
        if placement is None:
            self.release()
            raise DeadlineExceeded(
                f"the controller did not say within {timeout_s:g} s that the placement stays as it is"
            )

    def release(self) -> None:
        """Ends this router's hold of the placement. Does nothing if it held none."""
        self._hold = False
        self._applied.put(None)

    def renew(self) -> None:
        """Renews the lease at once, with the router's current state."""
        self._applied.put(None)

    def close(self) -> None:
        """Ends the stream and all waits."""
        self._closed.set()
        self._board.close()
        self._applied.put(None)
        with self._lock:
            if self._channel is not None:
                self._channel.close()
                self._channel = None
        self._thread.join(timeout=5.0)

    def _send_state(self, method: str, message: Report) -> bool:
        """Sends without waiting; returns False if it cannot. Keeps the call until it ends, else it would be
        cancelled."""
        with self._lock:
            if self._channel is None or len(self._saying) >= MAX_REPORTS:
                return False
            call = getattr(ControllerServiceStub(self._channel), method).future(message, timeout=REPORT_TIMEOUT_S)
            self._saying.add(call)
        call.add_done_callback(self._saying.discard)
        return True

    def _run(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._closed.is_set():
            before = self._board.number
            try:
                self._watch(self._resolve())
            except MoeClusterError as exc:
                if not self._closed.is_set():
                    logger.info("%s: the controller's placements stopped: %s", self.router, exc)
            backoff_s = FIRST_BACKOFF_S if self._board.number > before else min(2 * backoff_s, MAX_BACKOFF_S)
            self._closed.wait(backoff_s)

    def _watch(self, address: str) -> None:
        """Receives placements until the stream breaks, which raises a MoeClusterError."""
        channel = open_channel(address, self._credentials)
        broken = threading.Event()
        with self._lock:
            if self._closed.is_set():
                channel.close()
                return
            self._channel = channel
        try:
            for message in ControllerServiceStub(channel).WatchPlacement(self._renewals(broken)):
                placement, lease_s = decode_placement(message)
                self._renew_s = lease_s / RENEWALS_PER_LEASE
                self._reached = address
                self._board.publish(placement)
                self._applied.put(None)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, f"controller at {address}") from exc
        finally:
            broken.set()
            self._reached = ""
            self._applied.put(None)
            with self._lock:
                self._channel = None
            channel.close()

    def _renewals(self, broken: threading.Event) -> Iterator[controller_pb2.WatchRequest]:
        """Yields the applied placement and the router's state: now, after every placement, when the state has changed,
        and often enough to keep the lease."""
        while not broken.is_set() and not self._closed.is_set():
            number, state = self._board.number, self._state()
            yield controller_pb2.WatchRequest(
                router=self.router,
                applied_term=number.term,
                applied_generation=number.generation,
                hold=self._hold,
                state=encode_router_state(state),
            )
            self._wait_for_news(state)

    def _wait_for_news(self, sent: RouterState) -> None:
        """Returns when there is something to send, or the lease must be renewed."""
        until_s = time.monotonic() + self._renew_s
        while (left_s := until_s - time.monotonic()) > 0:
            try:
                self._applied.get(timeout=min(left_s, STATE_PERIOD_S))
                return
            except queue.Empty:
                if self._state() != sent:
                    return
