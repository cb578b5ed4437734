"""Connections of the server: their time limits, their number, and how they end on shutdown.

uvicorn limits the pause between two requests (`timeout_keep_alive`) and the size of headers (h11's
16 KiB). It has no limit for headers or bodies that arrive slowly, nor for clients that stop reading
an answer, and it reads a body to the end after the request was refused. Its `limit_concurrency`
answers requests with 503 and counts connections that have not sent one, so that silent clients
would lock out all others.
"""

import asyncio
from collections import Counter
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from ..report import console
from .engine import Engine
from .errors import ApiError
from .log import log, refusals
from .security import MAX_BODY, SECONDS_FOR_BODY

SECONDS_FOR_HEADERS = 10.0
SECONDS_TO_READ = 60.0  # of an answer, without the client taking a byte
SECONDS_TO_END = 3  # for open answers after Ctrl-C
MAX_RECEIVED = 2 * MAX_BODY  # bytes of a request; `Guard` refuses it before, by an answer
MAX_PIECES = 4096  # of a body, such as chunks: each takes h11 about 10 µs of the event loop
OTHER_FILES = 100  # open ones besides connections: libraries, the model, devices

HEADERS, BODY, ANSWER, UNREAD, CLOSING = "headers", "body", "answer", "unread", "closing"


def limits() -> dict[str, float]:
    """Seconds that a connection may stay in a state; `ANSWER` has no limit."""
    return {
        HEADERS: SECONDS_FOR_HEADERS,
        BODY: SECONDS_FOR_BODY + 5,  # `Guard` answers 408 first; the client has 5 s to read it
        UNREAD: SECONDS_TO_READ,
        CLOSING: SECONDS_TO_READ,
    }


async def _no_room(scope: Any, receive: Any, send: Any) -> None:
    """The application for a connection for which there is no room."""
    headers = {"retry-after": "1", "connection": "close"}
    error = ApiError("too many connections; try again in a moment", status=503, headers=headers)
    await error.response()(scope, receive, send)


class Parser(h11.Connection):
    """h11's parser; a request that is long, or in very small pieces, becomes malformed."""

    received = pieces = 0

    def receive_data(self, data: bytes) -> None:
        """Takes bytes of the client."""
        self.received += len(data)
        super().receive_data(data)

    def next_event(self) -> Any:
        """The next part of the request.

        Raises:
            RemoteProtocolError: malformed, or above a limit.
        """
        event = super().next_event()
        if isinstance(event, h11.Data):
            self.pieces += 1
            if self.received > MAX_RECEIVED or self.pieces > MAX_PIECES:
                raise h11.RemoteProtocolError("too long a body, or too many pieces of it")
        return event

    def start_next_cycle(self) -> None:
        """Begins the next request of the connection."""
        self.received = self.pieces = 0
        super().start_next_cycle()


class Connection(H11Protocol):
    """uvicorn's HTTP protocol on h11; knows what the connection waits for, and since when."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.conn = Parser(h11.SERVER)
        self.since = self.loop.time()
        self._waits_for: tuple[Any, ...] = (HEADERS, None, 0)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Registers the connection; at the limit, clients that send nothing make room for it."""
        super().connection_made(transport)
        if isinstance(self.server_state, Connections) and not self.server_state.make_room(self):
            self.app = _no_room

    @property
    def host(self) -> str:
        """The client's address."""
        return self.client[0] if self.client else "an unknown address"

    def state(self) -> str:
        """What the connection waits for: one of the five states above."""
        if self.transport.is_closing():
            return CLOSING
        if self.conn.their_state is h11.SEND_BODY:
            return BODY
        if self.cycle and not self.cycle.response_complete:
            return UNREAD if self.flow.write_paused else ANSWER
        return HEADERS

    def seconds_over(self, now: float) -> float:
        """Seconds above the limit of the state that the connection is in, since it last changed."""
        state = self.state()
        # another request, or bytes that the client took, begin a new wait
        unread = self.transport.get_write_buffer_size() if state in (UNREAD, CLOSING) else 0
        waits_for = (state, self.cycle, unread)
        if waits_for != self._waits_for:
            self._waits_for, self.since = waits_for, now
        return now - self.since - limits().get(state, float("inf"))

    def send_400_response(self, msg: str) -> None:
        """Answers a malformed request; closes the connection if another answer has begun."""
        if self.cycle:
            self.cycle.disconnected = True  # or the application might begin a second answer
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            refusals.note(400, msg, self.host)
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def shutdown(self) -> None:
        """Closes the connection, after its answer; a request that is half sent gets none."""
        if self.state() == BODY:
            self.transport.abort()
        else:
            super().shutdown()


class Connections(ServerState):
    """All connections of the server; closes those that are late or in the way of others.

    Args:
        limit: connections at a time.
    """

    connections: set[Connection]  # type: ignore[assignment]

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit
        self._closed: dict[str, Counter[str]] = {}  # reason: connections by address of the client

    def make_room(self, newest: Connection) -> bool:
        """Above the limit, closes the connections that have waited longest for a request.

        It closes a tenth of them at once, so that looking for them costs little per connection.

        Returns:
            False if all other connections are being answered.
        """
        if len(self.connections) <= self.limit:
            return True
        others = self.connections - {newest}
        waiting = [c for c in others if c.state() in (HEADERS, BODY)]
        waiting.sort(key=lambda connection: connection.since)
        for connection in waiting[: 1 + len(waiting) // 10]:
            self._close(connection, f"more than {self.limit:,} connections")
        return bool(waiting)

    def close_late(self) -> None:
        """Closes connections above the time limit of their state."""
        now = asyncio.get_running_loop().time()
        seconds = limits()
        reasons = {
            HEADERS: f"no whole request header in {seconds[HEADERS]:g} s",
            BODY: f"no whole request body in {seconds[BODY]:g} s",
            UNREAD: f"not a byte of the answer read in {seconds[UNREAD]:g} s",
            CLOSING: f"not a byte of the answer read in {seconds[CLOSING]:g} s",
        }
        for connection in list(self.connections):
            if connection.seconds_over(now) > 0:
                self._close(connection, reasons[connection.state()])

    def log(self) -> None:
        """Logs a line for each reason for which connections were closed since the last call."""
        for reason, hosts in self._closed.items():
            (host, most), count = hosts.most_common(1)[0], hosts.total()
            log("closed", f"{count} connection{'s' * (count > 1)}: {reason} ({most} from {host})")
        self._closed.clear()

    def close_all(self) -> None:
        """Closes every connection at once."""
        for connection in list(self.connections):
            connection.transport.abort()

    def _note(self, connection: Connection, reason: str) -> None:
        self._closed.setdefault(reason, Counter())[connection.host] += 1

    def _close(self, connection: Connection, reason: str) -> None:
        self._note(connection, reason)
        self.connections.discard(connection)  # uvicorn does so when the event loop comes to it
        connection.transport.abort()


class Server(uvicorn.Server):
    """uvicorn's server with limits of connections; on shutdown it ends open answers first.

    Args:
        config: its `http` is `Connection`.
        engine: closed on shutdown.
        max_connections: at a time.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, max_connections: int):
        super().__init__(config)
        self.engine = engine
        self.server_state: Connections = Connections(max_connections)

    def stop(self) -> None:
        """Asks the server to end, like Ctrl-C."""
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; looks for late connections once a second."""
        if counter % 10 == 0:
            self.server_state.close_late()
            self.server_state.log()
            refusals.log_rest()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        """Closes the engine and waits for open answers, then closes what is left.

        Connections are closed before uvicorn cancels their tasks, which it logs with a traceback.
        """
        self.engine.close()
        self.server_state.log()
        refusals.log_rest()
        asyncio.get_running_loop().call_later(SECONDS_TO_END, self.server_state.close_all)
        await super().shutdown(sockets)


def open_files_for(connections: int) -> int:
    """The number of connections, up to `connections`, that the limit of open files allows.

    The soft limit, often 1,024, is raised as far as the hard limit lets it. Above the limit the
    server could accept no connection at all.
    """
    try:
        import resource
    except ImportError:  # Windows
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        console.warn(
            f"max_connections={connections}: the system lets a process open {allowed:,} files, so "
            f"the server takes {max(1, allowed - OTHER_FILES):,} connections at a time (ulimit -n)"
        )
    return max(1, min(connections, allowed - OTHER_FILES))
