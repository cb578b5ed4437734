"""`ApiError`: an error in OpenAI's form, with its HTTP status."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from .log import refusals

MAX_ECHO = 100  # characters of a client's text that an error repeats


def quoted(text: str) -> str:
    """A client's text in quotes, without control characters, cut to `MAX_ECHO` characters."""
    return repr(text if len(text) <= MAX_ECHO else f"{text[: MAX_ECHO - 1]}…")


class Refusal(JSONResponse):
    """The response to a refused request; sending it writes a line into the log."""

    def __init__(self, error: "ApiError"):
        super().__init__(error.body(), error.status, error.headers)
        self.reason = str(error)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        client = scope.get("client") or ("an unknown address",)
        refusals.note(self.status_code, self.reason, client[0])
        await super().__call__(scope, receive, send)


class ApiError(Exception):
    """An error that the client gets as JSON, in OpenAI's form.

    Args:
        message: for the person who sent the request.
        status: HTTP status.
        param: the field of the request that is wrong.
        code: OpenAI's name of the error, for programs.
        headers: of the response, besides those that belong to the status.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        of_status = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}
        self.headers = of_status.get(status, {}) | dict(headers or {})

    def response(self) -> JSONResponse:
        """The response that tells the client."""
        return Refusal(self)

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": kind.get(self.status, default),
                "param": self.param,
                "code": self.code,
            }
        }


def unknown_field(name: str, fields: Iterable[str], param: str) -> ApiError:
    """The error for a field that a request may not have.

    Args:
        name: of the field.
        fields: names that the request may have, for "did you mean".
        param: the field's place in the request.
    """
    close = difflib.get_close_matches(name[:MAX_ECHO], list(fields), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return ApiError(
        f"unknown field {quoted(name)}{hint}", param=param[:MAX_ECHO], code="unknown_field"
    )


def from_validation(errors: list[Any]) -> ApiError:
    """Turns the first validation error of pydantic into an `ApiError`.

    A check of another wing may repeat the client's text whole, so a long message loses its middle.
    """
    param = ".".join(str(part) for part in errors[0]["loc"])
    message = errors[0]["msg"].removeprefix("Value error, ")
    if len(message) > 2 * MAX_ECHO:
        message = f"{message[:MAX_ECHO]}…{message[-MAX_ECHO:]}"
    return ApiError(f"{param}: {message[:1].lower()}{message[1:]}", param=param or None)
