"""Calls of tools in a model's answer, in the two forms in which the templates that we know have them written:

    <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>                            Hermes, Qwen 2.5 and 3
    <tool_call><function=add><parameter=a>1</parameter></function></tool_call>               Qwen 3.5
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from aurora_train.serve.refusal import Refusal

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>\s*", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def refuse_unknown(tools: list[dict[str, Any]], choice: Any, known: bool) -> bool:
    """Whether the model is to be told of the tools. Refusal for tools that are malformed, or that the template does not
    know, and for a choice that cannot be kept."""
    for number, tool in enumerate(tools):
        function = tool.get("function") if tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refusal('a tool is {"type": "function", "function": {"name", "description", "parameters"}}',
                          f"tools[{number}]")  # fmt: skip
    if choice not in (None, "auto", "none"):
        raise Refusal('tool_choice is "auto" or "none": no call can be forced here', "tool_choice",
                      "unsupported_parameter")  # fmt: skip
    if choice == "none" or not tools:
        return False
    if not known:
        raise Refusal("the chat template of this model does not know tools, or has calls written in a form that is not "
                      "read here; leave tools out", "tools", "unsupported_parameter")  # fmt: skip
    return True


def read(text: str, tools: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The calls in a text as OpenAI writes them; None if it is anything but complete calls."""
    if _CALL.sub("", text).strip():
        return None
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    found = [_read_one(inner, schemas) for inner in _CALL.findall(text)]
    if not found or None in found:
        return None
    return [
        {"id": f"call_{secrets.token_hex(12)}", "type": "function",
         "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}
        for name, arguments in found
    ]  # fmt: skip


def _read_one(inner: str, schemas: dict[str, Any]) -> tuple[str, dict] | None:
    if (function := _FUNCTION.fullmatch(inner)) is not None:
        kinds = schemas.get(function[1], {}).get("properties") or {}
        return function[1], {name: _value(text, kinds.get(name)) for name, text in _PARAMETER.findall(function[2])}
    try:
        call = json.loads(inner)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return (name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def _value(text: str, schema: Any) -> Any:
    """A parameter that was written without quotes: a text if the schema says so, else JSON if it is any."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
