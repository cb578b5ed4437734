"""`Guard`: checks every request before the application sees it, and adds the security headers.

Other web pages in the user's browser must not be able to use the server:

- Cross-origin requests are refused by their `Origin` header (no CORS at all).
- DNS rebinding, where a foreign name resolves to this machine, is refused by the `Host` header.
- Only `application/json` bodies are read. Forms and simple scripts of other sites cannot send them
  without a CORS preflight, which is refused.

Bodies have a limit of bytes and a limit of seconds.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import UserError
from .errors import ApiError, quoted

MAX_BODY = 2**20  # bytes; a context of 1024 tokens is about 5,000
SECONDS_FOR_BODY = 30.0  # until the last byte of a body
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}


def page_policy(html: str) -> str:
    """A Content-Security-Policy that allows the page's own script and style and nothing else.

    It names them by sha256, so text that is injected into the page cannot run.
    """

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(p.encode()).digest()).decode() for p in parts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def check_key(key: str) -> None:
    """Raises UserError for an API key that no request could send: HTTP strips and encodes it."""
    if key != key.strip() or not key.isascii() or not key.isprintable():
        raise UserError(
            "no client can send this API key: use printable ASCII characters, without spaces "
            "around them, in --api_key or GPT2_API_KEY"
        )


class Guard:
    """ASGI middleware that refuses requests of other web pages and without the API key.

    Args:
        app: the application behind it.
        hosts: names allowed in `Host`, in lower case, besides localhost and IP addresses.
        api_key: required by paths below /v1/; empty for none.
    """

    def __init__(self, app: ASGIApp, hosts: set[str], api_key: str):
        self.app, self.hosts, self.api_key = app, {"localhost", *hosts}, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                have = {name.lower() for name, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message["headers"], *(m for m in more if m[0] not in have)]
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
        except ApiError as error:
            await error.response()(scope, receive, send_with_headers)
            return
        await self.app(scope, _limited(receive), send_with_headers)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise ApiError(
                f"the host {quoted(host)} is not served here; name it in --allowed_hosts",
                status=421,
            )
        origin = headers.get("origin")
        if origin is not None and _host_of(origin) != host.lower():
            raise ApiError("pages of other sites may not use this server", status=403)
        if scope["path"].startswith("/v1/") and self.api_key and not self._has_key(headers):
            raise ApiError(
                "this server wants its API key: Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
            )
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError("send JSON, with Content-Type: application/json", status=415)
            if int(headers.get("content-length", 0)) > MAX_BODY:  # h11 has seen that it is a number
                raise _too_large()

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self.api_key.encode())
        return scheme.lower() == "bearer" and same

    def _is_ours(self, host: str) -> bool:
        """Whether `Host` is a known name or an IP address; DNS cannot rebind an address."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self.hosts:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _host_of(origin: str) -> str | None:
    """Host and port of an `Origin`; None if it is no address."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _too_large() -> ApiError:
    return ApiError(
        f"the body is larger than {MAX_BODY:,} bytes", status=413, code="request_too_large"
    )


def _limited(receive: Receive) -> Receive:
    """`receive` with limits for the body: its bytes, and the seconds until it is whole.

    Args:
        receive: of the ASGI server.
    """
    total, whole = 0, False
    deadline = asyncio.get_running_loop().time() + SECONDS_FOR_BODY

    async def counted() -> Message:
        nonlocal total, whole
        if whole:  # what comes now is the end of the connection, whenever that is
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            text = f"no whole body in {SECONDS_FOR_BODY:g} s"
            raise ApiError(text, status=408, code="request_timeout") from None
        total += len(message.get("body", b""))
        if total > MAX_BODY:
            raise _too_large()
        whole = not message.get("more_body", False)
        return message

    return counted
