"""How a route reads its body: as strict JSON, and without unknown fields where they are allowed."""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from moecluster.gateway.api_errors import Refusal, bad_request
from moecluster.gateway.schemas.known_fields import Fields, without_unknown
from moecluster.strict_json import JsonProblem, parse_json


class BodyRefused(HTTPException):
    """Carries a refusal through the framework, which turns other errors of a body's parser into its own."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.status, refusal.message)
        self.refusal = refusal


def json_route(tolerant: Mapping[str, type[Fields]]) -> type[APIRoute]:
    """The class of an app's routes. tolerant: path -> the body of which unknown fields are passed over."""

    class JsonRequest(Request):
        async def json(self) -> Any:
            try:
                value = parse_json(await self.body())
            except JsonProblem as exc:
                raise BodyRefused(bad_request(f"the body cannot be read: {exc}", param=exc.path or None)) from exc
            fields = tolerant.get(self.url.path)
            return value if fields is None else without_unknown(fields, value)

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_json(request: Request) -> Response:
                return await handle(JsonRequest(request.scope, request.receive))

            return handle_json

    return JsonRoute
