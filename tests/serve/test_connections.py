"""Clients that connect and do nothing, or half of it, over real sockets."""

import contextlib
import http.client
import json
import re
import resource
import signal
import socket
import statistics
import threading
import time

import pytest

from gpt2.serve.connections import MAX_PIECES, OTHER_FILES, open_files_for

from .running import Server, read_all, read_answer, save_model

HALF_HEADER = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
HALF_BODY = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Content-Length: 1000\r\n\r\n{"prompt": '
)
LIMIT = 1  # second, instead of 10, 30 and 60


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made = tmp_path_factory.mktemp("served") / "out_ckpt.pt"
    save_model(made)
    return made


@pytest.fixture(scope="module")
def hasty(path):
    """A server with limits of a second, and little room."""
    running = Server(path, "--max_connections=100", seconds=LIMIT, fork=True)
    yield running
    running.stop()


def send(connection: socket.socket, data: bytes) -> None:
    """Sends until the server closes the connection."""
    with contextlib.suppress(OSError):
        connection.sendall(data)


def milliseconds_of_health(server: Server, count: int = 15) -> float:
    """Median of `/health`, each time on a new connection."""
    took = []
    for _ in range(count):
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        assert json.load(answer)["status"] == "ok"
        connection.close()
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


@pytest.mark.fault(31, "500 half-sent headers, and 500 half-sent bodies, with and without room")
@pytest.mark.parametrize("room", [1000, 100])
@pytest.mark.parametrize("sent", [HALF_HEADER, HALF_BODY], ids=["header", "body"])
def test_500_half_open_connections_leave_the_server_free(path, room, sent, record_property):
    server = Server(path, f"--max_connections={room}", fork=True)
    try:
        half_open = [server.connect(sent) for _ in range(500)]
        took = milliseconds_of_health(server)
        assert took < 100
        if room < 500:
            server.wait_until_said("closed +[0-9]+ connections: more than 100 connections")
        for connection in half_open:
            connection.close()
    finally:
        began = time.monotonic()
        code, said = server.stop()
    assert code == 130
    assert time.monotonic() - began < 20
    assert "Traceback" not in said
    closed = re.findall(r"closed +(\d+) connections?: more than 100 connections", said)
    assert (sum(map(int, closed)) >= 400) == (room == 100), said
    record_property("survived", f"/health in {took:.0f} ms beside 500 half-open connections")


@pytest.mark.fault(31, "silence, half a header and half a body, until the time limit")
def test_headers_and_bodies_have_time_limits(hasty):
    began = time.monotonic()
    silent, header, body = (hasty.connect(sent) for sent in (b"", HALF_HEADER, HALF_BODY))
    late = hasty.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert read_answer(late)[0].startswith(b"HTTP/1.1 200 ")
    late.sendall(HALF_HEADER)  # the second request of a connection
    assert read_all(silent) == read_all(header) == b""
    assert LIMIT < time.monotonic() - began < 4 * LIMIT
    assert b"200 OK" not in read_all(late)
    head, content = read_answer(body)
    assert time.monotonic() - began < 5 * LIMIT
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(content)["error"]["code"] == "request_timeout"
    assert b"x-content-type-options: nosniff" in head
    hasty.wait_until_said(r"refused +408 +no whole body in 1 s \(from 127\.0\.0\.1\)")
    hasty.wait_until_said(r"closed +\d connections?: no whole request header in 1 s \(\d from 127")
    assert "Traceback" not in hasty.said


def test_a_refused_request_cannot_go_on_for_ever(hasty):
    """An answer, such as 415, comes before the body; the body's time limit holds all the same."""
    began = time.monotonic()
    body = hasty.connect(HALF_BODY.replace(b"application/json", b"text/plain"))
    assert read_answer(body)[0].startswith(b"HTTP/1.1 415 ")
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began < 20 * LIMIT:
            body.sendall(b"x")
            time.sleep(0.1)
    assert LIMIT < time.monotonic() - began < 15 * LIMIT
    hasty.wait_until_said("no whole request body in")


@pytest.mark.fault(31, "a body sent slowly within the limit, and requests one after the other")
def test_slow_clients_are_served_within_the_limits(hasty):
    body = b'{"prompt": "a", "max_tokens": 1}'
    slow = hasty.connect(HALF_BODY.partition(b"1000")[0] + b"%d\r\n\r\n" % len(body))
    for at in range(len(body)):
        slow.sendall(body[at : at + 1])
        time.sleep(0.5 * LIMIT / len(body))
    assert read_answer(slow)[0].startswith(b"HTTP/1.1 200 ")
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", hasty.port, timeout=30)
    while time.monotonic() - began < 3 * LIMIT:  # on one connection that is older than the limits
        connection.request("GET", "/health")
        assert json.load(connection.getresponse())["status"] == "ok"
        time.sleep(0.3 * LIMIT)
    connection.close()


@pytest.mark.fault(31, "a client that asks for the page 300 times and does not read it")
def test_a_client_that_does_not_read_is_left(hasty):
    ask = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    deaf = hasty.connect(300 * ask, buffer=4096)  # more than the system buffers
    hasty.wait_until_said("closed +1 connection: not a byte of the answer read in 1 s")
    deaf.close()
    assert "Traceback" not in hasty.said


@pytest.mark.fault(31, "Ctrl-C while bodies are half sent and a stream is not read")
def test_ctrl_c_beside_half_sent_bodies_has_no_traceback(path):
    server = Server(path, "--slots=8", "--max_queue=200")
    body = json.dumps({"prompt": ["a"] * 64, "max_tokens": 120, "stream": True}).encode()
    head = HALF_BODY.partition(b"1000")[0] + b"%d\r\n\r\n" % len(body)
    left = [server.connect(sent) for sent in (HALF_HEADER, HALF_BODY, HALF_BODY, b"", head + body)]
    server.health()  # those before it have arrived
    began = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    code, said = server.stop(ask=False)
    assert time.monotonic() - began < 20
    assert code == 130
    assert "Traceback" not in said
    assert "Exception" not in said
    for connection in left:
        connection.close()


def test_connections_above_the_limit_are_refused_when_all_are_busy(path):
    server = Server(path, "--max_connections=1", "--slots=1", fork=True)
    try:
        body = json.dumps({"prompt": ["a"] * 60, "max_tokens": 120, "stream": True}).encode()
        busy = server.connect(HALF_BODY.partition(b"1000")[0] + b"%d\r\n\r\n" % len(body) + body)
        assert busy.recv(100).startswith(b"HTTP/1.1 200 ")
        refused = server.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = read_all(refused)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "server_error"
        server.wait_until_said(r"refused +503  too many connections; [^\n]+ \(from 127")
        assert busy.recv(65536)  # goes on
        busy.close()
        server.wait_until_said("cancelled")
        assert server.health()["status"] == "ok"
    finally:
        server.stop()


def test_a_malformed_chunk_behind_an_answer_has_no_traceback(hasty):
    head = HALF_BODY.partition(b"Content-Length")[0].replace(b"application/json", b"text/plain")
    client = hasty.connect(head + b"Transfer-Encoding: chunked\r\n\r\n")
    assert read_answer(client)[0].startswith(b"HTTP/1.1 415 ")
    client.sendall(b"no length\r\n")
    assert read_all(client) == b""
    assert read_all(hasty.connect(b"nonsense\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
    hasty.wait_until_said(r"refused +415  send JSON, [^\n]+\n(.*\n)*.*refused +400  ")
    assert hasty.health()["status"] == "ok"
    assert "Traceback" not in hasty.said


@pytest.mark.fault(31, "a body in chunks of one byte, refused or not, without end")
@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_very_small_pieces_do_not_hold_up_others(path, kind):
    """Each takes the event loop some microseconds, also after the request was refused."""
    server = Server(path, fork=True)
    try:
        head = HALF_BODY.partition(b"Content-Length")[0].replace(b"application/json", kind.encode())
        client = server.connect(head + b"Transfer-Encoding: chunked\r\n\r\n")
        sender = threading.Thread(target=send, args=(client, b"1\r\nx\r\n" * 350_000), daemon=True)
        sender.start()
        time.sleep(0.1)
        slowest = max(milliseconds_of_health(server, 1) for _ in range(5))
        sender.join(30)
        client.close()
        assert slowest < 1000  # 3,000 if all of it was parsed
        honest = server.connect(head + b"Transfer-Encoding: chunked\r\n\r\n")
        honest.sendall(b"".join(b"4\r\n    \r\n" for _ in range(MAX_PIECES // 2)) + b"0\r\n\r\n")
        expected = {"application/json": b"400 Bad", "text/plain": b"415 "}[kind]
        assert expected in read_answer(honest)[0]
    finally:
        _, said = server.stop()
    assert "Traceback" not in said


def test_the_limit_of_open_files_is_raised_or_lowers_the_connections(capsys, monkeypatch):
    limits = [200, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(0, new[0]))
    assert open_files_for(50) == 50
    assert limits[0] == 200
    assert open_files_for(1000) == 1000
    assert limits[0] == 1000 + OTHER_FILES
    assert capsys.readouterr().err == ""
    assert open_files_for(5000) == 4096 - OTHER_FILES
    assert limits[0] == 4096
    assert "max_connections=5000: the system lets a process open 4,096" in capsys.readouterr().err
