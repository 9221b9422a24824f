"""The requests of OpenAI's protocol: what is understood, what is ignored because no answer depends on it, and what is
refused because an answer would silently not be what was asked for."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aurora_train.errors import nearest
from aurora_train.serve.refusal import Refusal

MOST_CHOICES = 128
# Fields that change no answer: who asks, how it is billed, kept or made faster.
HARMLESS = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "parallel_tool_calls",
})  # fmt: skip
# Fields that would change the answer and are not supported: the values that mean nothing, and what is refused.
_PENALTY = "use repetition_penalty, which divides the scores of tokens that are in the text"
REFUSED: dict[str, tuple[tuple, str]] = {
    "logit_bias": (({},), "no bias of single tokens is added here"),
    "presence_penalty": ((0,), f"the server has no such penalty; {_PENALTY}"),
    "frequency_penalty": ((0,), f"the server has no such penalty; {_PENALTY}"),
    "functions": (([],), "this is the older form; send `tools`"),
    "function_call": (("none",), "this is the older form; send `tool_choice`"),
    "modalities": ((["text"],), "this model writes text alone"),
    "audio": ((), "this model writes text alone"),
    "web_search_options": ((), "nothing is looked up: the server has no way out of this machine"),
    "reasoning_effort": (("none",), "the model has no such dial"),
    "verbosity": (("medium",), "the model has no such dial"),
    "suffix": (("",), "the model continues texts, and fills no gaps"),
    "best_of": ((1,), "answers are not ranked here; ask for n"),
}

_Text = str | list[dict[str, Any]]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI's padding against listeners; there is none here


class Message(_Strict):
    """One message. `content` may be null beside `tool_calls`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Text | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


class JsonSchema(_Strict):
    name: str = "answer"
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(_Strict):
    """OpenAI's three kinds, and "regex" with a `pattern`."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    pattern: str | None = None


class Asked(_Strict):
    """What both kinds of requests have. top_k, min_p and repetition_penalty are no fields of OpenAI's."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float = Field(0.0, ge=0, lt=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] = Field([], max_length=256)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer. Refusal for an empty one, which is everywhere."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if "" in stops or len(stops) > 16:
            raise Refusal("stop is a text, or up to 16 texts, of at least one character", "stop")
        return stops


class Chat(Asked):
    """A request for `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] | None = None

    @property
    def alternatives(self) -> int:
        """How many alternatives of each token are returned; -1: no log-probability at all."""
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal("top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else -1

    @property
    def most(self) -> int | None:
        """The most tokens of an answer; None: as many as there is room for."""
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise Refusal("max_tokens and max_completion_tokens are two names of one limit, and differ", "max_tokens")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Completion(Asked):
    """A request for `/v1/completions`. A prompt is a text, or ids; several are answered side by side."""

    prompt: str | list[int] | list[str] | list[list[int]] = ""
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    @property
    def alternatives(self) -> int:
        if self.echo and self.logprobs is not None:
            raise Refusal("the prompt's own log-probabilities are not computed; leave one of echo and logprobs out",
                          "echo")  # fmt: skip
        return -1 if self.logprobs is None else self.logprobs

    @property
    def most(self) -> int:
        return self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt. Refusal for none, and for ids that are empty."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if not given or any(one == [] for one in given):
            raise Refusal("prompt is a text, a list of texts, a list of ids, or a list of lists of ids, none of them "
                          "empty", "prompt")  # fmt: skip
        return [given] if isinstance(given[0], int) else list(given)


def parsed(content: bytes) -> dict[str, Any]:
    """The JSON object of a request's body. Refusal for anything else."""
    try:
        body = json.loads(content, parse_constant=_no_number)
        json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except RecursionError:
        raise Refusal("the body is nested too deeply") from None
    except UnicodeError as error:
        raise Refusal(f"the body is not UTF-8, or has half a character: {error}") from None
    except ValueError as error:
        raise Refusal(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refusal(f"the body is a JSON object, and not {_article(body)}")
    return body


def understood(kind: type[Asked], body: dict[str, Any]) -> Any:
    """The request of a body. Refusal for a field that is wrong, unknown, or not supported."""
    kept = {}
    for name, value in body.items():
        if value is None or name in HARMLESS:
            continue
        if name in REFUSED:
            neutral, why = REFUSED[name]
            if isinstance(value, bool) or value not in neutral:
                raise Refusal(f"{name} is not supported: {why}; leave it out", name, "unsupported_parameter")
            continue
        kept[name] = value
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        raise _refusal(kind, error.errors(include_url=False, include_context=False)) from None


def _refusal(kind: type[BaseModel], faults: list[dict]) -> Refusal:
    """The first fault that pydantic found, by the name of its field. Of a field of several types, which has a fault
    for each, it names the types."""
    first = next((one for one in faults if one["type"] == "extra_forbidden"), faults[0])
    place = [part for part in first["loc"] if isinstance(part, int) or _is_field(part)]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if first["type"] == "extra_forbidden":
        said = nearest(str(first["loc"][-1]), [*kind.model_fields, *REFUSED]) if len(place) == 1 else None
        return Refusal(f"{param} is not known here, and the answer might depend on it; {said or 'leave it out'}",
                       param, "unknown_parameter")  # fmt: skip
    same = [one["msg"] for one in faults if one["loc"][:1] == first["loc"][:1]]
    said = " or ".join(dict.fromkeys(message[:1].lower() + message[1:] for message in same[:4]))
    if first["type"] == "missing":
        return Refusal(f"{param} is missing", param, "missing_required_parameter")
    return Refusal(f"{param}: {said}", param, "invalid_value")


def _is_field(part: str) -> bool:
    """Whether a part of pydantic's location is a field: those of a union's members have brackets or are a type."""
    return part not in ("str", "int", "bool", "float", "dict") and "[" not in part


def _no_number(name: str):
    raise ValueError(f"{name} is no number of JSON")


def _article(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if not isinstance(value, float) or math.isfinite(value) else "no number")


def plain(message: Message, number: int) -> dict[str, Any]:
    """A message as chat templates read it: a developer is the system, parts are one text, arguments are an object."""
    where, found = f"messages[{number}]", message.model_dump(exclude_none=True, exclude={"refusal"})
    found["role"] = "system" if message.role == "developer" else message.role
    if isinstance(message.content, list):
        found["content"] = "".join(_part(part, f"{where}.content[{n}]") for n, part in enumerate(message.content))
    if message.content is None and not message.tool_calls:
        raise Refusal("a message has a content", f"{where}.content")
    if message.content is None:
        found["content"] = ""
    if message.tool_calls is not None:
        found["tool_calls"] = [_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(message.tool_calls)]
    return found


def _part(part: dict[str, Any], where: str) -> str:
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise Refusal('this model reads text alone: a part is {"type": "text", "text": "..."}', where)
    return part["text"]


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function")
    try:
        arguments = json.loads(function["arguments"]) if isinstance(function["arguments"], str) else None
    except (TypeError, KeyError, ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
        raise Refusal('a call is {"id", "type": "function", "function": {"name", "arguments"}}, and the arguments are '
                      "the text of a JSON object", where)  # fmt: skip
    return {**call, "function": {**function, "arguments": arguments}}
