"""The gateway's routes."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from moecluster import __version__
from moecluster.config.sections import SecurityConfig, ServeConfig
from moecluster.errors import MoeClusterError
from moecluster.gateway.access import Access
from moecluster.gateway.admission import Admission
from moecluster.gateway.api_errors import ApiError, api_error_of, api_error_of_validation, bad_request
from moecluster.gateway.api_keys import ApiKeys
from moecluster.gateway.format_response import ChatFormatter, CompletionFormatter, ResponseFormatter
from moecluster.gateway.health import health_of
from moecluster.gateway.json_route import BodyRejected, json_route
from moecluster.gateway.metrics import GatewayMetrics
from moecluster.gateway.middleware import CLUSTERS, SERVED, GatewayMiddleware
from moecluster.gateway.parallel import stream_all
from moecluster.gateway.parse_request import GenerationJob, parse_chat, parse_completion
from moecluster.gateway.schemas.known_fields import Fields
from moecluster.gateway.schemas.requests import ChatCompletionRequest, CompletionRequest
from moecluster.gateway.schemas.responses import ChatCompletion, Completion, ErrorBody, Health, ModelCard, ModelList
from moecluster.gateway.served_model import ServedModel, find_model
from moecluster.gateway.sse import DONE, EventStream, event
from moecluster.rpc.credentials import ClusterCredentials

logger = logging.getLogger(__name__)

ModelMaker = Callable[[AsyncExitStack], Awaitable[Sequence[ServedModel]]]

OWNER = "moecluster"
COMPLETIONS = "/v1/completions"
CHAT_COMPLETIONS = "/v1/chat/completions"
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is invalid"},
    401: {"model": ErrorBody, "description": "The API key or token is missing or wrong, or has expired"},
    403: {"model": ErrorBody, "description": "The token does not allow this"},
    404: {"model": ErrorBody, "description": "Unknown model"},
    408: {"model": ErrorBody, "description": "The request body did not arrive in time"},
    413: {"model": ErrorBody, "description": "The request body is too large"},
    429: {"model": ErrorBody, "description": "Too many requests; Retry-After says when to try again"},
    503: {"model": ErrorBody, "description": "No router can serve the request now"},
    "4XX": {"model": ErrorBody, "description": "Any other client error"},
}
# Schema of one event, as OpenAPI 3.2 and FastAPI describe a stream: data is one chunk in JSON, finally [DONE].
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_EVENTS = {"content": {"text/event-stream": {"itemSchema": _EVENT}}}


class Gateway:
    """State shared by the routes. Built before the event loop runs; its models are built in the loop."""

    def __init__(self, settings: ServeConfig, security: SecurityConfig, keys: ApiKeys, metrics: GatewayMetrics) -> None:
        """security: who may do without a key or token."""
        self.settings = settings
        self.metrics = metrics
        self.access = Access(
            keys,
            allow_without_keys=security.allow_without_keys,
            open_metrics=security.open_metrics,
            credentials=self._credentials,
        )
        self.admission = Admission(settings)
        self.models: Sequence[ServedModel] = ()

    def model(self, request: Request, name: str) -> ServedModel:
        """Returns the model of that name. Raises ApiError: 404 if there is none, 403 if the request's token is of
        another cluster."""
        model = find_model(self.models, name)
        if model not in self.models_for(request):
            raise ApiError(403, f"the token is of another cluster than the model `{model.name}`", code="missing_scope")
        return model

    def models_for(self, request: Request) -> list[ServedModel]:
        """Returns the models that the caller of a request may use."""
        clusters: frozenset[str] | None = request.scope.get(CLUSTERS)
        return [model for model in self.models if clusters is None or model.cluster in clusters]

    def _credentials(self) -> dict[str, ClusterCredentials]:
        found = {model.cluster: model.discovery.credentials for model in self.models}
        return {cluster: credentials for cluster, credentials in found.items() if credentials is not None}

    async def answer(
        self, request: Request, name: str, job: GenerationJob, formatter_of: type[ResponseFormatter]
    ) -> Response:
        """Runs a job and returns its response, whole or as server-sent events.

        Raises ApiError, for a stream only before its first byte is sent.
        """
        model = self.model(request, name)
        request.scope[SERVED] = model.name
        if len(job.requests) > self.settings.max_inflight:
            raise bad_request(f"n: {len(job.requests)} choices are more than this server generates at once", param="n")
        formatter, translated = formatter_of(job, model.name), partial(_router_errors_translated, model, job)
        chunks = stream_all(model, job.requests, self.admission)
        if job.stream:
            with translated():
                first = await anext(chunks)  # an error here still gets its HTTP status
            return EventStream(_events(formatter, first, chunks, translated))
        async with aclosing(chunks):
            with translated():
                async for index, chunk in chunks:
                    formatter.add(index, chunk)
        return JSONResponse(formatter.whole())


@contextmanager
def _router_errors_translated(model: ServedModel, job: GenerationJob) -> Iterator[None]:
    """Context: errors of routers become ApiErrors."""
    try:
        yield
    except MoeClusterError as exc:
        prompt_param = "messages" if job.requests[0].messages_json else "prompt"
        api_error = api_error_of(exc, model.name, prompt_param=prompt_param)
        if api_error.status >= 500:
            logger.warning("%s: a request failed: %s", model.name, exc)
        raise api_error from exc


async def _events(
    formatter: ResponseFormatter,
    first: tuple[int, Any],
    chunks: AsyncGenerator[tuple[int, Any]],
    translated: Callable[[], AbstractContextManager[None]],
) -> AsyncGenerator[bytes]:
    async with aclosing(chunks):
        try:
            for content in formatter.events(*first):
                yield event(content)
            with translated():
                async for index, chunk in chunks:
                    for content in formatter.events(index, chunk):
                        yield event(content)
        except ApiError as api_error:  # too late for an HTTP status
            yield event(api_error.body())
            return
    for content in formatter.last_events():
        yield event(content)
    yield DONE


def build_app(gateway: Gateway, make_models: ModelMaker) -> GatewayMiddleware:
    """Returns the ASGI app. make_models: starts the models in the event loop that serves; its stack closes them."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            gateway.models = await make_models(stack)
            yield

    app = FastAPI(
        title="moecluster",
        description="OpenAI-compatible API of a moecluster gateway.",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=running,
        redirect_slashes=False,
    )
    bodies: dict[str, type[Fields]] = {COMPLETIONS: CompletionRequest, CHAT_COMPLETIONS: ChatCompletionRequest}
    app.router.route_class = json_route(bodies if gateway.settings.allow_unknown_fields else {})
    _add_generation(app, gateway)
    _add_models(app, gateway)
    _add_monitoring(app, gateway)
    app.add_exception_handler(ApiError, _send_api_error)
    app.add_exception_handler(HTTPException, _send_http_error)
    app.add_exception_handler(RequestValidationError, _send_validation_error)
    app.add_exception_handler(Exception, _send_internal_error)
    return GatewayMiddleware(
        app, access=gateway.access, admission=gateway.admission, settings=gateway.settings, metrics=gateway.metrics
    )


def _add_generation(app: FastAPI, gateway: Gateway) -> None:
    @app.post(COMPLETIONS, responses={200: {"model": Completion, **_EVENTS}, **_ERRORS}, response_model=None)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Completes one or more prompts."""
        return await gateway.answer(request, body.model, parse_completion(body), CompletionFormatter)

    @app.post(CHAT_COMPLETIONS, responses={200: {"model": ChatCompletion, **_EVENTS}, **_ERRORS}, response_model=None)
    async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
        """Generates the next message of a conversation."""
        return await gateway.answer(request, body.model, parse_chat(body), ChatFormatter)


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    def card(model: ServedModel) -> ModelCard:
        return ModelCard(
            id=model.name,
            object="model",
            created=model.created,
            owned_by=OWNER,
            max_model_len=model.discovery.max_tokens,
        )

    refused: dict[int | str, dict[str, Any]] = {status: _ERRORS[status] for status in (401, 403, 429)}

    @app.get("/v1/models", responses=refused)
    async def models(request: Request) -> ModelList:
        """Lists the served models."""
        return ModelList(object="list", data=[card(model) for model in gateway.models_for(request)])

    @app.get("/v1/models/{name:path}", responses={**refused, 404: _ERRORS[404], "4XX": _ERRORS["4XX"]})
    async def model(request: Request, name: str) -> ModelCard:
        """Returns one served model."""
        return card(gateway.model(request, name))


def _add_monitoring(app: FastAPI, gateway: Gateway) -> None:
    @app.get(
        "/health", response_model=Health, responses={503: {"model": Health, "description": "A model has no router"}}
    )
    async def health() -> Response:
        """Reports whether every model is served, and what is wrong otherwise."""
        found = health_of(gateway.models)
        return JSONResponse(found.model_dump(), status_code=503 if found.status == "not ready" else 200)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, 401: _ERRORS[401], 403: _ERRORS[403]},
    )
    async def metrics() -> Response:
        """Returns the gateway's metrics in the Prometheus text format."""
        return Response(gateway.metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def _send_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _send_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return api_error_of_validation(error.errors()).response()


async def _send_http_error(request: Request, error: Exception) -> Response:
    """Errors that the framework raises: an unknown path, a wrong method, a body that cannot be read."""
    assert isinstance(error, HTTPException)
    if isinstance(error, BodyRejected):
        return error.api_error.response()
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(404, f"there is nothing at {where}", code="unknown_url").response()
    if error.status_code == 405:
        return ApiError(405, f"not allowed: {where}", code="method_not_allowed", headers=error.headers).response()
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def _send_internal_error(request: Request, error: Exception) -> Response:
    """A bug: the server logs its traceback, the client sees none of it."""
    return ApiError(500, "internal server error", kind="server_error", code="internal_error").response()
