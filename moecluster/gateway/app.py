"""The routes of the front."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from moecluster import __version__
from moecluster.config.sections import ServeConfig
from moecluster.errors import MoeClusterError
from moecluster.gateway.admission import Admission
from moecluster.gateway.api_errors import Refusal, bad_request, refusal_of, refusal_of_validation
from moecluster.gateway.api_keys import ApiKeys
from moecluster.gateway.format_response import ChatForm, CompletionForm, Form
from moecluster.gateway.health import health_of
from moecluster.gateway.json_route import BodyRefused, json_route
from moecluster.gateway.metrics import FrontMetrics
from moecluster.gateway.middleware import SERVED, Gate
from moecluster.gateway.parallel import write_texts
from moecluster.gateway.parse_request import Job, chat_job, completion_job
from moecluster.gateway.schemas.known_fields import Fields
from moecluster.gateway.schemas.requests import ChatBody, CompletionBody
from moecluster.gateway.schemas.responses import ChatCompletion, Completion, ErrorBody, Health, ModelCard, ModelList
from moecluster.gateway.served_model import ServedModel, find_model
from moecluster.gateway.sse import DONE, EventStream, event

logger = logging.getLogger(__name__)

ModelMaker = Callable[[AsyncExitStack], Awaitable[Sequence[ServedModel]]]

OWNER = "moecluster"
COMPLETIONS = "/v1/completions"
CHAT_COMPLETIONS = "/v1/chat/completions"
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is wrong"},
    401: {"model": ErrorBody, "description": "The API key is missing or wrong"},
    404: {"model": ErrorBody, "description": "There is no such model"},
    408: {"model": ErrorBody, "description": "The body did not arrive in time"},
    413: {"model": ErrorBody, "description": "The body is too large"},
    429: {"model": ErrorBody, "description": "Too many requests; Retry-After says when to try again"},
    503: {"model": ErrorBody, "description": "No router serves now"},
    "4XX": {"model": ErrorBody, "description": "Anything else that is wrong"},
}
# Of each event, as OpenAPI 3.2 and FastAPI describe a stream: data is one chunk in JSON, at last [DONE].
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_EVENTS = {"content": {"text/event-stream": {"itemSchema": _EVENT}}}


class Front:
    """What the routes share. Made before the event loop runs; its models are made in it."""

    def __init__(self, settings: ServeConfig, keys: ApiKeys, metrics: FrontMetrics) -> None:
        self.settings = settings
        self.keys = keys
        self.metrics = metrics
        self.admission = Admission(settings)
        self.models: Sequence[ServedModel] = ()

    async def answer(self, request: Request, name: str, job: Job, form_of: type[Form]) -> Response:
        """The texts of a job, whole or as events. Raises Refusal, where nothing was told yet."""
        model = find_model(self.models, name)
        request.scope[SERVED] = model.name
        if len(job.requests) > self.settings.max_inflight:
            raise bad_request(f"n: {len(job.requests)} texts are more than this server writes at once", param="n")
        form = form_of(job, model.name)
        pieces = self._pieces(model, job)
        if job.stream:
            first = await anext(pieces)  # what refuses a text does so before anything is told
            return EventStream(_events(form, first, pieces))
        async with aclosing(pieces):
            async for index, piece in pieces:
                form.add(index, piece)
        return JSONResponse(form.whole())

    async def _pieces(self, model: ServedModel, job: Job) -> AsyncGenerator[tuple[int, Any]]:
        try:
            with self.admission.writing(len(job.requests)):
                async with aclosing(write_texts(model, job.requests)) as pieces:
                    async for index, piece in pieces:
                        yield index, piece
        except MoeClusterError as exc:
            prompt_param = "messages" if job.requests[0].messages_json else "prompt"
            refusal = refusal_of(exc, model.name, prompt_param=prompt_param)
            if refusal.status >= 500:
                logger.warning("%s: a request failed: %s", model.name, exc)
            raise refusal from exc


async def _events(form: Form, first: tuple[int, Any], pieces: AsyncGenerator[tuple[int, Any]]) -> AsyncGenerator[bytes]:
    async with aclosing(pieces):
        try:
            for chunk in form.chunks(*first):
                yield event(chunk)
            async for index, piece in pieces:
                for chunk in form.chunks(index, piece):
                    yield event(chunk)
        except Refusal as refusal:  # too late for a status
            yield event(refusal.body())
            return
    for chunk in form.last_chunks():
        yield event(chunk)
    yield DONE


def build_app(front: Front, make_models: ModelMaker) -> Gate:
    """The ASGI app. make_models: begins and ends the models, in the event loop that serves."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            front.models = await make_models(stack)
            yield

    app = FastAPI(
        title="moecluster",
        description="OpenAI's API over an expert cluster.",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=running,
        redirect_slashes=False,
    )
    bodies: dict[str, type[Fields]] = {COMPLETIONS: CompletionBody, CHAT_COMPLETIONS: ChatBody}
    app.router.route_class = json_route(bodies if front.settings.allow_unknown_fields else {})
    _add_texts(app, front)
    _add_models(app, front)
    _add_watching(app, front)
    app.add_exception_handler(Refusal, _tell_refusal)
    app.add_exception_handler(HTTPException, _tell_http_error)
    app.add_exception_handler(RequestValidationError, _tell_validation)
    app.add_exception_handler(Exception, _tell_failure)
    return Gate(app, keys=front.keys, admission=front.admission, settings=front.settings, metrics=front.metrics)


def _add_texts(app: FastAPI, front: Front) -> None:
    @app.post(COMPLETIONS, responses={200: {"model": Completion, **_EVENTS}, **_ERRORS}, response_model=None)
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Texts that go on from prompts."""
        return await front.answer(request, body.model, completion_job(body), CompletionForm)

    @app.post(CHAT_COMPLETIONS, responses={200: {"model": ChatCompletion, **_EVENTS}, **_ERRORS}, response_model=None)
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        """What the model says next in a conversation."""
        return await front.answer(request, body.model, chat_job(body), ChatForm)


def _add_models(app: FastAPI, front: Front) -> None:
    def card(model: ServedModel) -> ModelCard:
        return ModelCard(
            id=model.name,
            object="model",
            created=model.created,
            owned_by=OWNER,
            max_model_len=model.directory.max_tokens,
        )

    @app.get("/v1/models", responses={401: _ERRORS[401]})
    async def models() -> ModelList:
        """All models."""
        return ModelList(object="list", data=[card(model) for model in front.models])

    @app.get("/v1/models/{name:path}", responses={401: _ERRORS[401], 404: _ERRORS[404], "4XX": _ERRORS["4XX"]})
    async def model(name: str) -> ModelCard:
        """One model."""
        return card(find_model(front.models, name))


def _add_watching(app: FastAPI, front: Front) -> None:
    @app.get("/health", response_model=Health, responses={503: {"model": Health, "description": "Nobody writes texts"}})
    async def health() -> Response:
        """Whether every model is served, and what is wrong where it is not, or not wholly."""
        found = health_of(front.models)
        return JSONResponse(found.model_dump(), status_code=503 if found.status == "not ready" else 200)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(front.metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def _tell_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _tell_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return refusal_of_validation(error.errors()).response()


async def _tell_http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses: an unknown path, a wrong method, a body that cannot be read."""
    assert isinstance(error, HTTPException)
    if isinstance(error, BodyRefused):
        return error.refusal.response()
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return Refusal(404, f"there is nothing at {where}", code="unknown_url").response()
    if error.status_code == 405:
        return Refusal(405, f"not allowed: {where}", code="method_not_allowed", headers=error.headers).response()
    return Refusal(error.status_code, str(error.detail), headers=error.headers).response()


async def _tell_failure(request: Request, error: Exception) -> Response:
    """A mistake of ours. Its traceback is logged by the server, and not told."""
    return Refusal(500, "the server made a mistake", kind="server_error", code="internal_error").response()
