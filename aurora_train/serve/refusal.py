"""A request that the server refuses, in the form in which OpenAI's clients read errors."""

from __future__ import annotations

from aurora_train.errors import UserError

# The type of an error by its status; any other below 500 is the request's fault.
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An answer that is an error.

    Args:
        message: what, why, and the nearest thing that works.
        param: the field of the request at fault, such as `messages[0].role`.
        code: a word for programs, such as "context_length_exceeded".
        status: of HTTP.
        headers: further headers of the answer.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, *, status: int = 400,
                 headers: dict[str, str] | None = None):  # fmt: skip
        super().__init__(message)
        self.message, self.param, self.code, self.status, self.headers = message, param, code, status, headers or {}

    @classmethod
    def of(cls, fault: UserError) -> Refusal:
        """The refusal that a mistake in a request becomes."""
        return cls("; ".join(part for part in (fault.what, fault.why, fault.hint) if part), fault.where)

    def body(self) -> dict:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
