"""Requests that a server has to refuse: (path, body, the field that it names, or None)."""

from __future__ import annotations

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_HELLO = [{"role": "user", "content": "Hello"}]


def _chat(param: str | None, **fields):
    return CHAT, {"messages": _HELLO, "max_tokens": 2} | fields, param


def _text(param: str | None, **fields):
    return TEXT, {"prompt": "Hello", "max_tokens": 2} | fields, param


def _said(param: str, *messages):
    return CHAT, {"messages": list(messages), "max_tokens": 2}, param


_DEEP = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
_FIELDS = [("n", 0), ("n", -1), ("n", 1.5), ("n", "2"), ("n", True), ("n", 129), ("temperature", -0.1),
           ("temperature", 2.1), ("temperature", "hot"), ("temperature", []), ("top_p", 0), ("top_p", 1.1),
           ("top_p", "x"), ("top_k", 0), ("top_k", -5), ("top_k", 1.5), ("min_p", -1), ("min_p", 1),
           ("repetition_penalty", 0), ("repetition_penalty", -1), ("max_tokens", 0), ("max_tokens", -3),
           ("max_tokens", 10**6), ("max_tokens", "many"), ("max_tokens", 1.5), ("seed", 1.5), ("seed", "s"),
           ("seed", 2**63), ("stop", 5), ("stop", ""), ("stop", [""]), ("stop", [1]), ("stop", ["x"] * 17),
           ("stream", "yes"), ("stream", 1), ("stream_options", []), ("model", 7), ("model", "gpt-4o"),
           ("logit_bias", {"5": 100}), ("presence_penalty", 0.5), ("frequency_penalty", -2),
           ("best_of", 3)]  # fmt: skip

MALFORMED = [
    *((CHAT, body, None) for body in (
        b"", b"{", b"null", b"[]", b"5", b'"text"', b"\xff\xfe", b'{"messages": NaN}', b'{"a": 1e999}x', _DEEP,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"n": ' + b"9" * 5000 + b"}",
    )),
    *((TEXT, body, None) for body in (b"", b"\x00", b"true", b"{'prompt': 1}", b'{"prompt": "\\udfff"}')),
    *(_chat(name, **{name: value}) for name, value in _FIELDS),
    *(_text(name, **{name: value}) for name, value in _FIELDS if name not in ("model", "seed", "stream")),
    (CHAT, {}, "messages"), (CHAT, {"messages": []}, "messages"), (CHAT, {"messages": "Hello"}, "messages"),
    (CHAT, {"messages": [5]}, "messages[0]"), (CHAT, {"messages": {}}, "messages"),
    _said("messages[0].role", {"content": "Hello"}), _said("messages[0].role", {"role": "king", "content": "Hello"}),
    _said("messages[0].content", {"role": "user"}), _said("messages[0].content", {"role": "user", "content": None}),
    _said("messages[0].content", {"role": "user", "content": 5}),
    _said("messages[1].content[0]", _HELLO[0], {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
    _said("messages[0].content[0]", {"role": "user", "content": [{"type": "text"}]}),
    _said("messages[0].colour", {"role": "user", "content": "Hello", "colour": "red"}),
    _said("messages[0]", {"role": "user", "content": "Stop <|im_end|> here"}),
    _said("messages[0].tool_calls[0]", {"role": "assistant", "tool_calls": [{}]}),
    _said("messages[0].tool_calls[0]",
          {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "["}}]}),
    _chat("messages", messages=[{"role": "user", "content": "long " * 400}], max_tokens=None),
    _chat("temprature", temprature=1), _chat("unheard_of", unheard_of=True), _chat("functions", functions=[{}]),
    _chat("tools", tools=[{"type": "function", "function": {"name": "add"}}]), _chat("tools[0]", tools=[{}]),
    _chat("tools", tools="add"), _chat("tool_choice", tool_choice="required"),
    _chat("top_logprobs", top_logprobs=2), _chat("top_logprobs", logprobs=True, top_logprobs=21),
    _chat("logprobs", logprobs="yes"), _chat("max_tokens", max_completion_tokens=3),
    _chat("response_format", response_format="json"), _chat("response_format.type", response_format={"type": "xml"}),
    _chat("response_format.json_schema", response_format={"type": "json_schema"}),
    _chat("response_format.pattern", response_format={"type": "regex"}),
    _chat("modalities", modalities=["audio"]), _chat("reasoning_effort", reasoning_effort="high"),
    _chat("audio", audio={}), _chat("stream_options.usage", stream_options={"usage": True}),
    _text("prompt", prompt=[]), _text("prompt", prompt=[[]]), _text("prompt", prompt=5), _text("prompt", prompt=[1.5]),
    _text("prompt", prompt=[300]), _text("prompt", prompt=[-1]), _text("prompt", prompt=[[5], [300]]),
    _text("prompt", prompt=["a", 5]), _text("prompt", prompt={"text": "a"}), _text("prompt", prompt="word " * 500),
    _text("logprobs", logprobs=21), _text("logprobs", logprobs=True), _text("echo", echo=True, logprobs=1),
    _text("echo", echo="yes"), _text("suffix", suffix="end"), _text("messages", messages=_HELLO),
]  # fmt: skip
