"""`Guard`: checks every request before the application sees it, and adds the security headers.

Other web pages in the user's browser must not be able to use the server:

- Cross-origin requests are refused by their `Origin` header (no CORS at all).
- DNS rebinding, where a foreign name resolves to this machine, is refused by the `Host` header.
- Only `application/json` bodies are read. Forms and simple scripts of other sites cannot send them
  without a CORS preflight, which is refused.
"""

import base64
import hashlib
import hmac
import ipaddress
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

MAX_BODY = 2**20  # bytes; a context of 1024 tokens is about 5,000
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
            answer = JSONResponse(error.body(), error.status)
            await answer(scope, receive, send_with_headers)
            return
        await self.app(scope, _limited(receive), send_with_headers)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise ApiError(
                f"the host {host!r} is not served here; name it in --allowed_hosts", status=421
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError("pages of other sites may not use this server", status=403)
        if scope["path"].startswith("/v1/") and self.api_key:
            given = headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode(), self.api_key.encode()):
                raise ApiError(
                    "this server wants its API key: Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                )
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError("send JSON, with Content-Type: application/json", status=415)
            length = headers.get("content-length", "")
            if length.isdigit() and int(length) > MAX_BODY:
                raise _too_large()

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


def _too_large() -> ApiError:
    return ApiError(
        f"the body is larger than {MAX_BODY:,} bytes", status=413, code="request_too_large"
    )


def _limited(receive: Receive) -> Receive:
    """`receive` with a limit for bodies without Content-Length."""
    total = 0

    async def counted() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > MAX_BODY:
            raise HTTPException(413, str(_too_large()))
        return message

    return counted
