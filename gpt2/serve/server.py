"""`gpt2 serve`: OpenAI's API and a chat page over `Engine`."""

import asyncio
import contextlib
import socket
import time
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from ..api import GPT2
from ..checkpoint.weights import check_vocabulary
from ..config.commands import ServeConfig
from ..data.conversations import is_chat
from ..distributed import environment
from ..distributed.devices import choose_dtype
from ..errors import UserError
from ..report import console
from ..tokenizer import gpt2_tokenizer
from .engine import Busy, Engine, Failed, TextRequest, latency
from .requests import ChatRequest, CompletionRequest, Sampled, check_model, make_job
from .responses import MAX_TEXTS, Answer, ApiError, Served, event, from_validation
from .security import Guard, page_policy

PAGE = Path(__file__).with_name("chat.html")
SECONDS_TO_END = 3  # for open answers, after Ctrl-C
GONE = 499  # what nginx calls a client that has closed the connection


def run(path: str, config: ServeConfig) -> int:
    """Serves a model until Ctrl-C or SIGTERM, which raise; 1 when writing has failed."""
    listener = _listen(config.host, config.port)
    model = _load(path, config)
    served = describe(path, config, model)
    engine = Engine(model, config.slots, config.max_queue)
    key = config.api_key or environment.variable("GPT2_API_KEY")
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
    settings = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="on", server_header=False,
        timeout_graceful_shutdown=SECONDS_TO_END,
    )  # fmt: skip
    server = _Server(settings, engine)
    engine.on_failure = server.stop
    with listener:
        server.run(sockets=[listener])
    if engine.failure:
        console.error(engine.failure)
    return 1 if engine.failure else 0


class _Server(uvicorn.Server):
    """Ends open answers first when it is asked to stop."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self.engine = engine

    def stop(self):
        """Asks it to end, as Ctrl-C does."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None):
        """As uvicorn's."""
        self.engine.close()
        await super().shutdown(sockets)


def describe(path: str, config: ServeConfig, model: GPT2) -> Served:
    """What requests need to know of a model."""
    source, chat = Path(path), config.chat
    if getattr(model.config, "document_mask", False):
        kind = "impossible"
    elif chat == "True" or (chat == "auto" and _was_chat(source)):
        kind = "trained"
    else:
        kind = "untrained"
    name = source.resolve().parent.name if source.name == "out_ckpt.pt" else source.stem
    return Served(
        name=config.name or name or "gpt2", block_size=model.config.block_size, chat=kind,
        vocab_size=model.config.vocab_size, max_new_tokens=config.max_new_tokens,
        max_texts=min(MAX_TEXTS, config.slots + config.max_queue), created=int(time.time()),
    )  # fmt: skip


def make_app(engine: Engine, served: Served) -> FastAPI:
    """The routes; the engine runs as long as the application does."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start(asyncio.get_running_loop())
        yield
        engine.close()

    # no pages of FastAPI's own, which load scripts from elsewhere
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    html = PAGE.read_text("utf-8")
    policy = {"content-security-policy": page_policy(html)}

    @app.get("/", response_class=HTMLResponse)
    async def page():
        return HTMLResponse(html, headers=policy)

    @app.get("/health")
    async def health():
        return JSONResponse(_health(engine, served), 503 if engine.failure else 200)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [served.card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        check_model(name, served)
        return served.card()

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request):
        return await _answer(body, request, engine, served)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request):
        return await _answer(body, request, engine, served)

    _handle_errors(app)
    return app


def _handle_errors(app: FastAPI):
    """Every error in OpenAI's form."""

    def shaped(error: ApiError) -> JSONResponse:
        headers = {"retry-after": "1"} if error.status == 429 else {}
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(ApiError)
    async def known(_: Request, error: ApiError):
        return shaped(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):
        kind = ChatRequest if "chat" in request.url.path else CompletionRequest
        return shaped(from_validation(list(error.errors()), kind.model_fields))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException):
        text = {404: f"no such address: {request.url.path}",
                405: f"{request.method} is not allowed here"}  # fmt: skip
        message = text.get(error.status_code, str(error.detail))
        return shaped(ApiError(message, status=error.status_code))

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception):
        return shaped(ApiError(f"internal error ({type(error).__name__})", status=500))


async def _answer(body: Sampled, request: Request, engine: Engine, served: Served) -> Response:
    """Puts a request into the queue and answers it, at once or as it is written."""
    # long texts take a moment to encode; the streams of others go on
    job, prompts = await asyncio.to_thread(make_job, body, served)
    chat, stream = isinstance(body, ChatRequest), bool(body.stream)
    answer = Answer(job, served.name, chat=chat, stream=stream, with_usage=body.includes_usage())
    try:
        engine.submit(job)
    except Busy as error:
        raise ApiError(str(error), status=429, code="rate_limit_exceeded") from None
    except Failed as error:
        raise ApiError(str(error), status=503) from None
    echo = not chat and body.echo
    begin = (
        [gpt2_tokenizer().decode(p) for p in prompts for _ in range(body.n or 1)] if echo else None
    )
    watch = asyncio.create_task(_end_when_gone(request, engine, job))
    if stream:
        events = _events(engine, job, answer, begin, watch)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"x-accel-buffering": "no"}
        )
    texts = begin or [""] * len(job.choices)
    try:
        async with _logged(engine, job, watch):
            async for piece in job.pieces():
                texts[piece.choice.index] += piece.text
    except Failed as error:
        raise ApiError(str(error), status=503) from None
    if job.over != "done":
        return Response(status_code=GONE)
    return JSONResponse(answer.whole(texts))


async def _events(
    engine: Engine, job: TextRequest, answer: Answer, begin: list[str] | None, watch: asyncio.Task
) -> AsyncIterator[bytes]:
    """The server-sent events of an answer."""
    try:
        async with _logged(engine, job, watch):
            for choice in job.choices:
                if answer.chat or begin:
                    text = None if answer.chat else begin[choice.index]
                    yield event(answer.chunk(choice.index, text))
            async for piece in job.pieces():
                index = piece.choice.index
                if answer.chat and piece.text and piece.finish:  # OpenAI ends a chat with no text
                    yield event(answer.chunk(index, piece.text))
                    yield event(answer.chunk(index, "", piece.finish))
                else:
                    yield event(answer.chunk(index, piece.text, piece.finish))
    except Failed as error:
        yield event(ApiError(str(error), status=503).body())
        return
    if answer.with_usage:
        yield event(answer.last())
    yield event("[DONE]")


async def _end_when_gone(request: Request, engine: Engine, job: TextRequest):
    """Frees what a job has when its client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    _finish(engine, job, "cancelled")


@contextlib.asynccontextmanager
async def _logged(engine: Engine, job: TextRequest, watch: asyncio.Task) -> AsyncIterator[None]:
    """Around the reading of a job: whatever happens, it is over afterwards, and in the log."""
    how = "cancelled"
    try:
        yield
        if not job.over:
            how = "done"
    except Failed:
        how = "failed"
        raise
    finally:
        watch.cancel()
        _finish(engine, job, how)


def _finish(engine: Engine, job: TextRequest, how: str):
    """Ends a job and writes its line of the log, once."""
    if job.over:
        return
    engine.finish(job, how)
    took = latency(job)
    ends = ",".join(sorted({c.finish for c in job.choices if c.finish})) or how
    texts = f"{len(job.choices)} texts  " if len(job.choices) > 1 else ""
    console.log(
        f"{time.strftime('%H:%M:%S')}  {how:9s}  {texts}{job.prompt_tokens} + {job.written} tokens"
        f"  {ends}  queue {took['queue_seconds']:.2f} s"
        f"  first token {took['first_token_seconds']:.2f} s"
        f"  {took['tokens_per_second']:.1f} tokens/s"
    )


def _health(engine: Engine, served: Served) -> dict[str, Any]:
    running, waiting = engine.load()
    return {
        "status": "failed" if engine.failure else "ok",
        "model": served.name,
        "slots": engine.slots,
        "running": running,
        "waiting": waiting,
        "requests": engine.counts,
        "latency": engine.percentiles(),
    }


def _load(path: str, config: ServeConfig) -> GPT2:
    model = GPT2.from_pretrained(path, device=config.device)
    check_vocabulary(model.config, path)
    device = model.transformer.wte.weight.device
    best = choose_dtype("auto", device)[0] if device.type == "cuda" else torch.float32
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and best == torch.bfloat16)
    return model.bfloat16() if half else model


def _was_chat(source: Path) -> bool:
    """Whether the run that wrote a checkpoint, by the config.toml beside it, learned to talk."""
    try:
        settings = tomllib.loads(source.with_name("config.toml").read_text("utf-8"))
        return is_chat(str(settings["data_dir"]))
    except (OSError, ValueError, KeyError):
        return False


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that nobody loads a model in vain.

    Raises:
        UserError: the port is taken, the address is none of this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        other = f"; use --port={port + 1 if port < 65535 else 0}" if _in_use(error) else ""
        raise UserError(f"cannot listen on port {port} of {host}: {reason}{other}") from None


def _in_use(error: Exception) -> bool:
    import errno

    return getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES)
