"""Routes that read their body as strict JSON, and drop unknown fields where they are allowed."""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from moecluster.gateway.api_errors import ApiError, bad_request
from moecluster.gateway.schemas.known_fields import Fields, without_unknown
from moecluster.strict_json import JsonProblem, parse_json


class BodyRejected(HTTPException):
    """Carries an ApiError through FastAPI, which replaces any other error of a body parser with its own."""

    def __init__(self, api_error: ApiError) -> None:
        super().__init__(api_error.status, api_error.message)
        self.api_error = api_error


def json_route(tolerant: Mapping[str, type[Fields]]) -> type[APIRoute]:
    """Returns the route class of an app. tolerant: path -> request schema of which unknown fields are dropped."""

    class JsonRequest(Request):
        async def json(self) -> Any:
            try:
                value = parse_json(await self.body())
            except JsonProblem as exc:
                raise BodyRejected(bad_request(f"the body cannot be read: {exc}", param=exc.path or None)) from exc
            fields = tolerant.get(self.url.path)
            return value if fields is None else without_unknown(fields, value)

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_json(request: Request) -> Response:
                return await handle(JsonRequest(request.scope, request.receive))

            return handle_json

    return JsonRoute
