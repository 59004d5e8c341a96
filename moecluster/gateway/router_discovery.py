"""Router discovery: polls the controller and the routers for which routers exist and which one to ask first."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from moecluster.errors import ClusterEnded, MoeClusterError
from moecluster.gateway.router_connection import RouterConnection
from moecluster.proto import controller_pb2
from moecluster.proto.controller_pb2_grpc import ControllerServiceStub
from moecluster.rpc.controller.status_messages import decode_status
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.server import open_async_channel
from moecluster.types import ControllerStatus

logger = logging.getLogger(__name__)

POLL_S = 1.0
CONTROLLER_TIMEOUT_S = 2.0
REDISCOVER_EVERY_S = 5.0
FORGET_S = 60.0  # until a router is dropped that neither answers nor is named by anyone


@dataclass(frozen=True, kw_only=True)
class ClusterAddresses:
    """Addresses, host:port. Empty: unknown."""

    routers: tuple[str, ...] = ()
    controller: str = ""
    credentials: ClusterCredentials | None = None  # that the cluster requires


class RouterDiscovery:
    """The routers of one cluster. Starts from the seeds and polls the controller and the routers about once a second;
    calls rediscover when no router answers.
    """

    def __init__(
        self,
        seeds: ClusterAddresses,
        *,
        rediscover: Callable[[], ClusterAddresses] | None = None,
        poll_s: float = POLL_S,
        on_poll: Callable[[int], None] = lambda answering: None,
    ) -> None:
        """rediscover: runs in a thread, may take long, and may raise a MoeClusterError: ClusterEnded if the cluster
        does not come back by itself. on_poll: called after every poll with the number of routers that answer.
        """
        self._controller = seeds.controller
        self._credentials = seeds.credentials
        self._rediscover = rediscover
        self._poll_s = poll_s
        self._on_poll = on_poll
        self._seeds = seeds.routers
        self._routers: dict[str, RouterConnection] = {}
        self._news = asyncio.Event()  # set and replaced after every poll
        self._poll_now = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._searching: asyncio.Task[None] | None = None
        self._searched_s = float("-inf")
        self.cluster: ControllerStatus | None = None  # from the controller at the last poll; None: it did not answer
        self.ended = ""  # why the cluster does not come back by itself; empty: it is not known to have ended

    async def start(self) -> None:
        """Polls once, then starts polling in the background."""
        for address in self._seeds:
            self._add(address)
        await self._poll()
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stops polling and closes all connections."""
        tasks = [task for task in (self._task, self._searching) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(router.close() for router in self._routers.values()))

    def candidates(self) -> list[RouterConnection]:
        """Returns the routers, best first. Those that have just failed come last."""
        return sorted(self._routers.values(), key=lambda router: router.preference)

    def failed(self, router: RouterConnection) -> None:
        """Notes that a router has just failed a request, and polls soon."""
        router.failed()
        self._poll_now.set()

    async def wait_for_news(self, timeout_s: float) -> None:
        """Waits for the next poll, or until the timeout."""
        self._poll_now.set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            pass

    @property
    def answering(self) -> int:
        """How many routers answer."""
        return sum(router.status is not None for router in self._routers.values())

    @property
    def credentials(self) -> ClusterCredentials | None:
        """Those of the cluster as it was last found."""
        return self._credentials

    @property
    def has_controller(self) -> bool:
        """Whether the controller's address is known."""
        return bool(self._controller)

    @property
    def max_tokens(self) -> int | None:
        """Maximum length of prompt and generated tokens together, as the routers report; None: unknown."""
        status = [router.status.max_tokens for router in self._routers.values() if router.status is not None]
        return min((tokens for tokens in status if tokens), default=None)

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._poll_now.wait()
                await asyncio.sleep(self._poll_s / 10)  # coalesces many calls of failed() and wait_for_news()
            except TimeoutError:
                pass
            self._poll_now.clear()
            await self._poll()

    async def _poll(self) -> None:
        status, *_ = await asyncio.gather(self._ask_controller(), *(r.poll() for r in self._routers.values()))
        self.cluster = status
        if self.answering:
            self.ended = ""
        if status is not None:
            self._take(status)
        elif self.answering:
            self._follow_routers()
        if not self.answering:
            self._search()
        await self._forget_lost()
        self._on_poll(self.answering)
        self._news.set()
        self._news = asyncio.Event()

    async def _ask_controller(self) -> ControllerStatus | None:
        if not self._controller:
            return None
        channel = open_async_channel(self._controller, self._credentials)
        try:
            request = controller_pb2.ControllerStatusRequest()
            stub: Any = ControllerServiceStub(channel)  # typed for threads
            return decode_status(await stub.Status(request, timeout=CONTROLLER_TIMEOUT_S))
        except (grpc.RpcError, MoeClusterError) as exc:
            logger.debug("the controller at %s does not answer: %s", self._controller, exc)
            return None
        finally:
            await channel.close()

    def _take(self, status: ControllerStatus) -> None:
        for state in status.router_states:
            if state.address:
                router = self._add(state.address)
                router.leaving, router.listed_s = state.leaving, time.monotonic()

    def _follow_routers(self) -> None:
        """Takes the controller's address from the routers: they find a controller that restarted elsewhere first."""
        statuses = [router.status for router in self._routers.values()]
        for address in (status.controller for status in statuses if status is not None):
            if address and address != self._controller:
                self._controller = address
                return

    def _search(self) -> None:
        rested = time.monotonic() - self._searched_s > REDISCOVER_EVERY_S
        if self._rediscover is not None and rested and (self._searching is None or self._searching.done()):
            self._searching = asyncio.create_task(self._found(self._rediscover))

    async def _found(self, rediscover: Callable[[], ClusterAddresses]) -> None:
        try:
            where = await asyncio.to_thread(rediscover)
        except ClusterEnded as exc:
            if not self.ended:
                logger.error("%s", exc)
            self.ended = str(exc)
            return
        except MoeClusterError as exc:
            logger.info("no process of the cluster answers, and its current addresses are unknown: %s", exc)
            return
        finally:
            self._searched_s = time.monotonic()
        self.ended = ""
        self._controller = where.controller or self._controller
        await self._take_credentials(where.credentials)
        for address in where.routers:
            self._add(address).listed_s = time.monotonic()
        self._poll_now.set()

    async def _take_credentials(self, credentials: ClusterCredentials | None) -> None:
        """Drops all connections if the secret has changed: a cluster that was brought up anew has another one."""
        if credentials is None or credentials == self._credentials:
            return
        self._credentials = credentials
        old, self._routers = self._routers, {}
        for router in old.values():
            await router.close()

    def _add(self, address: str) -> RouterConnection:
        if address not in self._routers:
            self._routers[address] = RouterConnection(address, self._credentials)
        return self._routers[address]

    async def _forget_lost(self) -> None:
        """Drops routers that are gone, but keeps the last known ones while none answers: they may come back."""
        now_s = time.monotonic()
        for address, router in list(self._routers.items()):
            lost = router.status is None and router.idle and now_s - router.listed_s > FORGET_S
            if lost and self.answering:
                del self._routers[address]
                await router.close()
