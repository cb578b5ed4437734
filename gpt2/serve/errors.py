"""`ApiError`: an error in OpenAI's form, with its HTTP status."""

import difflib
from collections.abc import Iterable
from typing import Any


class ApiError(Exception):
    """An error that the client gets as JSON, in OpenAI's form.

    Args:
        message: for the person who sent the request.
        status: HTTP status.
        param: the field of the request that is wrong.
        code: OpenAI's name of the error, for programs.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

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


def from_validation(errors: list[dict[str, Any]], fields: Iterable[str]) -> ApiError:
    """Turns the first validation error of pydantic into an `ApiError`.

    Args:
        errors: pydantic's list; each `loc` begins with "body".
        fields: names that the request may have, for "did you mean".
    """
    first = errors[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(where) or None
    if first["type"] == "json_invalid":
        return ApiError(f"the body is not JSON: {first.get('ctx', {}).get('error', '')}")
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(where[-1], list(fields), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return ApiError(f"unknown field {where[-1]!r}{hint}", param=param, code="unknown_field")
    if not param:
        return ApiError("the body must be a JSON object")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(f"{param}: {message[:1].lower()}{message[1:]}", param=param)
