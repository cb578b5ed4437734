"""`gpt2 serve`: HTTP routes of OpenAI's API and a chat page, on top of `Engine`."""

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ..api import GPT2, TextModel
from ..checkpoint.weights import locate
from ..config.commands import ServeConfig
from ..data.conversations import chat_kind
from ..distributed import environment
from ..distributed.devices import choose_dtype
from ..errors import UserError
from ..report import console
from .connections import SECONDS_TO_END, Connection, Server, open_files_for
from .docs_page import docs_page, template
from .engine import Busy, Engine, Failed, TextRequest, latency
from .errors import ApiError, quoted
from .log import log
from .openapi import openapi
from .page import chat_page
from .requests import (
    ChatRequest,
    CompletionRequest,
    SamplingRequest,
    check_model,
    make_request,
    parse,
)
from .responses import Answer, event
from .security import Guard, check_key, page_policy
from .served_model import MAX_TEXTS, ServedModel

GET = ["GET", "HEAD"]
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that closed the connection


def run(path: str, config: ServeConfig) -> int:
    """Serves a model until Ctrl-C or SIGTERM, which raise; returns 1 if generation has failed."""
    key = config.api_key or environment.variable("GPT2_API_KEY")
    check_key(key)
    listener = _listen(config.host, config.port)
    model = _load(path, config)
    served = describe(path, config, model)
    engine = Engine(model, config.slots, config.max_queue)
    hosts = {h.strip().lower() for h in (config.host, *config.allowed_hosts.split(","))} - {""}
    app = Guard(make_app(engine, served), hosts, key)
    host, port = listener.getsockname()[:2]
    console.log(
        f"{served.name}: {model.num_parameters():,} parameters on "
        f"{model.transformer.wte.weight.device}, {str(model.transformer.wte.weight.dtype)[6:]}, "
        f"context {served.block_size:,}, {config.slots} texts at a time"
    )
    shown = f"[{host}]" if ":" in host else host
    console.log(f"http://{shown}:{port}/ has the chat page, /v1 OpenAI's API; Ctrl-C ends")
    if not key and host not in ("127.0.0.1", "::1"):
        console.warn("everybody who reaches this address can use it: consider --api_key")
    most = open_files_for(config.max_connections)
    settings = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=SECONDS_TO_END + 1,
    )
    server = Server(settings, engine, most)
    engine.on_failure = server.stop
    with listener:
        server.run(sockets=[listener])
    if engine.failure:
        console.error(engine.failure)
    return 1 if engine.failure else 0


def describe(path: str, config: ServeConfig, model: TextModel) -> ServedModel:
    """The facts about a model that requests are checked against."""
    source = locate(path)
    kind = chat_kind(source, model.config, model.tokenizer)
    if kind != "impossible" and config.chat != "auto":
        kind = "trained" if config.chat == "True" else "untrained"
    return ServedModel(
        name=config.name or _name_of(source),
        block_size=model.config.block_size,
        vocab_size=model.config.vocab_size,
        chat=kind,
        max_texts=min(MAX_TEXTS, config.slots + config.max_queue),
        max_new_tokens=config.max_new_tokens,
        created=int(time.time()),
        tokenizer=model.tokenizer,
    )


def _name_of(source: Path) -> str:
    """The name of a folder or of a model on the Hub; of a file without its ending."""
    place = Path(os.path.abspath(source)) if source.exists() else source  # "." has a name, too
    if place.name == "out_ckpt.pt":
        return place.parent.name or "gpt2"
    return (place.stem if place.is_file() else place.name) or "gpt2"


def make_app(engine: Engine, served: ServedModel) -> FastAPI:
    """The application with its routes; the engine starts and ends with it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start(asyncio.get_running_loop())
        yield
        engine.close()

    # without FastAPI's own pages of the API: they load scripts from other hosts
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    _add_pages(app, served)

    @app.api_route("/health", methods=GET)
    async def health() -> JSONResponse:
        return JSONResponse(_health(engine, served), 503 if engine.failure else 200)

    @app.api_route("/v1/models", methods=GET)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [served.card()]}

    @app.api_route("/v1/models/{name:path}", methods=GET)
    async def model(name: str) -> dict[str, Any]:
        check_model(name, served)
        return served.card()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(CompletionRequest, request, engine, served)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(ChatRequest, request, engine, served)

    _handle_errors(app)
    return app


def _add_pages(app: FastAPI, served: ServedModel) -> None:
    """Adds what a browser shows, and the description of the API."""
    html, document = chat_page(), openapi(served)
    policy = {"content-security-policy": page_policy(html)}
    docs_policy = {"content-security-policy": page_policy(template())}

    @app.api_route("/", methods=GET, response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=policy)

    @app.api_route("/docs", methods=GET, response_class=HTMLResponse)
    async def docs(request: Request) -> HTMLResponse:
        url = f"{request.url.scheme}://{request.headers['host']}"
        return HTMLResponse(docs_page(document, url, served.name), headers=docs_policy)

    @app.api_route("/openapi.json", methods=GET)
    async def description() -> dict[str, Any]:
        return document


def _handle_errors(app: FastAPI) -> None:
    """Makes the application answer every error in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        text = {
            404: f"no such address: {quoted(request.url.path)}; a client's base_url ends in /v1",
            405: f"{quoted(request.method)} is not allowed here",
        }
        message = text.get(error.status_code, str(error.detail))
        return ApiError(message, status=error.status_code, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        return _internal_error(error).response()


def _internal_error(error: Exception) -> ApiError:
    return ApiError(f"internal error ({type(error).__name__})", status=500)


async def _answer(
    kind: type[SamplingRequest], connection: Request, engine: Engine, served: ServedModel
) -> Response:
    """Reads a request; the response puts it into the queue and answers it."""
    raw = await connection.body()
    # in threads: encoding a long text would hold up the streams of other clients
    body = await asyncio.to_thread(parse, raw, kind)
    request = await asyncio.to_thread(make_request, body, served)
    answer = Answer(
        request,
        served.name,
        chat=isinstance(body, ChatRequest),
        stream=bool(body.stream),
        with_usage=body.includes_usage(),
        logprobs=body.likeliest() is not None,
    )
    return _QueuedResponse(engine, request, answer)


class _QueuedResponse(Response):
    """Puts a request into the queue and answers it, whole or as a stream."""

    def __init__(self, engine: Engine, request: TextRequest, answer: Answer):
        super().__init__()
        self.engine, self.request, self.answer = engine, request, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError if there is no room in the queue, or if generation has failed."""
        async with _queued(self.engine, self.request, receive):
            if self.answer.stream:
                response: Response = StreamingResponse(
                    _events(self.engine, self.request, self.answer),
                    media_type="text/event-stream",
                    headers={"x-accel-buffering": "no"},
                )
            else:
                response = await _whole(self.engine, self.request, self.answer)
            await response(scope, receive, send)


@contextlib.asynccontextmanager
async def _queued(engine: Engine, request: TextRequest, receive: Receive) -> AsyncIterator[None]:
    """Context in which a request is queued, generated and answered.

    On every exit, whatever raised, the request is over: it holds no slot, and it is counted.
    """
    try:
        engine.submit(request)
    except Busy as error:
        raise ApiError(str(error), status=429, code="rate_limit_exceeded") from None
    except Failed as error:
        raise ApiError(str(error), status=503) from None
    how, watch = "failed", None
    try:
        watch = asyncio.create_task(_cancel_when_gone(engine, request, receive))
        yield
        how = "cancelled"  # unless all of it was read, which has ended the request
    except (asyncio.CancelledError, GeneratorExit, ClientDisconnect):
        how = "cancelled"
        raise
    finally:
        _finish(engine, request, how)
        if watch:
            watch.cancel()


async def _whole(engine: Engine, request: TextRequest, answer: Answer) -> Response:
    """The response with the whole answer.

    Raises:
        ApiError: the server is stopping, or generation has failed.
    """
    try:
        pieces = [piece async for piece in request.pieces()]
    except Failed as error:
        raise ApiError(str(error), status=503) from None
    if request.over:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if not answer.logprobs:
        response = JSONResponse(answer.whole(pieces))
    else:  # perhaps megabytes
        response = await asyncio.to_thread(lambda: JSONResponse(answer.whole(pieces)))
    _finish(engine, request, "done")
    return response


async def _events(engine: Engine, request: TextRequest, answer: Answer) -> AsyncIterator[bytes]:
    """The server-sent events of an answer."""
    try:
        if answer.chat:
            for choice in request.choices:
                yield event(answer.chunk(choice.index, None))
        async for piece in request.pieces():
            for chunk in answer.chunks(piece):
                yield event(chunk)
        _finish(engine, request, "done")
        if answer.with_usage:
            yield event(answer.last())
        yield event("[DONE]")
    except Failed as error:
        _finish(engine, request, "failed")
        yield event(ApiError(str(error), status=503).body())
    except Exception as error:
        yield event(_internal_error(error).body())
        raise


async def _cancel_when_gone(engine: Engine, request: TextRequest, receive: Receive) -> None:
    """Cancels a request when its client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    _finish(engine, request, "cancelled")


def _finish(engine: Engine, request: TextRequest, how: str) -> None:
    """Ends a request and logs one line about it; a second call does nothing."""
    if request.over:
        return
    engine.finish(request, how)
    took = latency(request)
    ends = ",".join(sorted({c.finish for c in request.choices if c.finish})) or how
    texts = f"{len(request.choices)} texts  " if len(request.choices) > 1 else ""
    log(
        how,
        f"{texts}{request.prompt_tokens} + {request.written} tokens  {ends}"
        f"  queue {took['queue_seconds']:.2f} s"
        f"  first token {took['first_token_seconds']:.2f} s"
        f"  {took['tokens_per_second']:.1f} tokens/s",
    )


def _health(engine: Engine, served: ServedModel) -> dict[str, Any]:
    running, waiting = engine.count_texts()
    return {
        "status": "failed" if engine.failure else "ok",
        "model": served.name,
        "slots": engine.slots,
        "running": running,
        "waiting": waiting,
        "requests": engine.counts,
        "latency": engine.percentiles(),
    }


def _load(path: str, config: ServeConfig) -> TextModel:
    model = GPT2.from_pretrained(path, device=config.device)
    model.tokenizer.check()
    device = model.transformer.wte.weight.device
    best = choose_dtype("auto", device)[0] if device.type == "cuda" else torch.float32
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and best == torch.bfloat16)
    return model.bfloat16() if half else model


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, opened before the model is loaded: a taken port fails early.

    Raises:
        UserError: the port is taken, or the address does not belong to this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        other = f"; use --port={port + 1 if port < 65535 else 0}" if _in_use(error) else ""
        raise UserError(f"cannot listen on port {port} of {host}: {reason}{other}") from None


def _in_use(error: Exception) -> bool:
    return getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES)
