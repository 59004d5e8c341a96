"""Which routers of a cluster there are, and which one to ask: looked up all the time, from whoever still answers."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from moecluster.errors import ClusterEnded, MoeClusterError
from moecluster.gateway.router_connection import KnownRouter
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
FORGET_S = 60.0  # a router that nobody names and that does not answer


@dataclass(frozen=True, kw_only=True)
class Whereabouts:
    """Addresses, host:port. An empty one is not known."""

    routers: tuple[str, ...] = ()
    controller: str = ""
    credentials: ClusterCredentials | None = None  # that the cluster asks for


class RouterDirectory:
    """The routers of one cluster. Begins with what it is told, asks the controller and the routers about once a second,
    and when none of them answers any more, whoever else may know.
    """

    def __init__(
        self,
        seeds: Whereabouts,
        *,
        rediscover: Callable[[], Whereabouts] | None = None,
        poll_s: float = POLL_S,
        on_look: Callable[[int], None] = lambda answering: None,
    ) -> None:
        """rediscover: runs in a thread, may take long, and may raise a MoeClusterError: ClusterEnded if nothing comes
        back. on_look: is told how many
        routers answer.
        """
        self._controller = seeds.controller
        self._credentials = seeds.credentials
        self._rediscover = rediscover
        self._poll_s = poll_s
        self._on_look = on_look
        self._seeds = seeds.routers
        self._routers: dict[str, KnownRouter] = {}
        self._news = asyncio.Event()  # set and replaced after every look
        self._look_now = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._searching: asyncio.Task[None] | None = None
        self._searched_s = float("-inf")
        self.cluster: ControllerStatus | None = None  # as its controller said at the last look; None: it did not
        self.ended = ""  # why nothing of the cluster comes back by itself; empty: it is not known to have ended

    async def start(self) -> None:
        """Looks once, then goes on looking."""
        for address in self._seeds:
            self._know(address)
        await self._look()
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Ends all connections."""
        tasks = [task for task in (self._task, self._searching) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(router.close() for router in self._routers.values()))

    def candidates(self) -> list[KnownRouter]:
        """The best to ask first. Those that failed just now come last."""
        return sorted(self._routers.values(), key=lambda router: router.standing)

    def failed(self, router: KnownRouter) -> None:
        """A router has just lost a text."""
        router.failed()
        self._look_now.set()

    async def wait_for_news(self, timeout_s: float) -> None:
        """Until the routers were looked at again."""
        self._look_now.set()
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
    def knows_controller(self) -> bool:
        """Whether there is an address to ask."""
        return bool(self._controller)

    @property
    def max_tokens(self) -> int | None:
        """Prompt and continuation together, as the routers say; None: not known."""
        said = [router.status.max_tokens for router in self._routers.values() if router.status is not None]
        return min((tokens for tokens in said if tokens), default=None)

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._look_now.wait()
                await asyncio.sleep(self._poll_s / 10)  # many ask at once
            except TimeoutError:
                pass
            self._look_now.clear()
            await self._look()

    async def _look(self) -> None:
        said, *_ = await asyncio.gather(self._ask_controller(), *(r.look() for r in self._routers.values()))
        self.cluster = said
        if self.answering:
            self.ended = ""
        if said is not None:
            self._take(said)
        elif self.answering:
            self._follow_routers()
        if not self.answering:
            self._search()
        await self._forget_lost()
        self._on_look(self.answering)
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
                router = self._know(state.address)
                router.leaving, router.listed_s = state.leaving, time.monotonic()

    def _follow_routers(self) -> None:
        """The controller was started elsewhere; routers find it first."""
        statuses = [router.status for router in self._routers.values()]
        for address in (status.controller for status in statuses if status is not None):
            if address and address != self._controller:
                self._controller = address
                return

    def _search(self) -> None:
        rested = time.monotonic() - self._searched_s > REDISCOVER_EVERY_S
        if self._rediscover is not None and rested and (self._searching is None or self._searching.done()):
            self._searching = asyncio.create_task(self._found(self._rediscover))

    async def _found(self, rediscover: Callable[[], Whereabouts]) -> None:
        try:
            where = await asyncio.to_thread(rediscover)
        except ClusterEnded as exc:
            if not self.ended:
                logger.error("%s", exc)
            self.ended = str(exc)
            return
        except MoeClusterError as exc:
            logger.info("nobody of the cluster answers, and where it is now is not to be learnt: %s", exc)
            return
        finally:
            self._searched_s = time.monotonic()
        self.ended = ""
        self._controller = where.controller or self._controller
        await self._take_credentials(where.credentials)
        for address in where.routers:
            self._know(address).listed_s = time.monotonic()
        self._look_now.set()

    async def _take_credentials(self, credentials: ClusterCredentials | None) -> None:
        """A cluster that was brought up anew has another secret: connections with the old one are of no use."""
        if credentials is None or credentials == self._credentials:
            return
        self._credentials = credentials
        old, self._routers = self._routers, {}
        for router in old.values():
            await router.close()

    def _know(self, address: str) -> KnownRouter:
        if address not in self._routers:
            self._routers[address] = KnownRouter(address, self._credentials)
        return self._routers[address]

    async def _forget_lost(self) -> None:
        """Of routers that are gone; the last ones known are kept, they may come back."""
        now_s = time.monotonic()
        for address, router in list(self._routers.items()):
            lost = router.status is None and router.idle and now_s - router.listed_s > FORGET_S
            if lost and self.answering:
                del self._routers[address]
                await router.close()
