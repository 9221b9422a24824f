"""Twelve conversations and five templates, with what real templates do: the cases of the template tests.

Run as a program, it writes what transformers renders of them to `rendered.json` (needs the extra [parity]).
"""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).with_name("rendered.json")
MARKS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
DATE = "2026-07-26T09:05:00"

_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "The weather <now> & later, in °C",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}  # fmt: skip
_CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2.5, None]}}}


def said(*turns: str, system: str | None = None) -> list[dict]:
    """A conversation of user and assistant in turn."""
    begun = [] if system is None else [{"role": "system", "content": system}]
    return begun + [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]


# name: (messages, arguments of the template)
CONVERSATIONS = {
    "one question": (said("Hello"), {"add_generation_prompt": True}),
    "a system prompt": (said("Hello", system="  Be brief.\n"), {"add_generation_prompt": True}),
    "an answer": (said("Hello", "Hi."), {}),
    "three turns": (said("a", "b", "c", "d", "e", system="s"), {"add_generation_prompt": True}),
    "markup and quotes": (said("<b>\"it's\"</b> & {{ x }} {% if %}", "`a\\nb`"), {}),
    "other scripts": (said("日本語 und Ümläute\t🙂", "שלום"), {}),
    "empty texts": (said("", "", "  "), {"add_generation_prompt": True}),
    "lines": (said("one\n\ntwo\n", "\n three \n"), {}),
    "thoughts": (said("2+2?", "<think>\nTwo and two.\n</think>\n\n4", "sure?"), {"add_generation_prompt": True}),
    "no thoughts": (said("2+2?"), {"add_generation_prompt": True, "enable_thinking": False}),
    "tools": (said("Weather?", system="s"), {"add_generation_prompt": True, "tools": [_WEATHER]}),
    "a tool's answer": (
        [*said("Weather?"), {"role": "assistant", "content": None, "tool_calls": [_CALL]},
         {"role": "tool", "name": "weather", "content": "21 °C"}, {"role": "assistant", "content": "It is 21 °C."}],
        {"tools": [_WEATHER]},
    ),
}  # fmt: skip

TEMPLATES = {
    "chatml": """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
{{- '<|im_start|>system\nYou help.<|im_end|>\n' }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message.content | default('') }}<|im_end|>{% endgeneration %}

    {%- else %}
{{ '\n' if not loop.first }}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    <|im_start|>assistant
{% endif %}""",
    "dated": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
<|head|>system<|end|>

Today: {{ date_string }}
{% if tools is not none and tools %}
{%- for t in tools %}
{{- t | tojson(indent=4) }}
{{- "\n\n" }}
{%- endfor %}
{%- endif %}
{{- system_message }}{{ eos_token }}
{%- for message in messages %}
    {%- if message.role == 'tool' or 'tool_calls' in message %}
        {%- if message.tool_calls %}
            {%- set call = message.tool_calls[0].function %}
            {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ "}" + eos_token }}
        {%- else %}
            {{- message.content | tojson + eos_token }}
        {%- endif %}
    {%- else %}
    {{- '<|head|>' + message['role'] + '<|end|>\n\n'+ message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|end|>\n\n' }}
{%- endif %}
""",
    "thinking": """{%- macro shown(message) -%}
<|{{ message.role }}|>{{ caller() if caller is defined else '' }}
{%- endmacro -%}
{%- set ns = namespace(last_query=messages|length - 1, seen=0) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" %}
        {%- set ns.last_query = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- set ns.seen = ns.seen + 1 %}
        {%- continue %}
    {%- endif %}
    {%- set content = message.content if message.content is string else '' %}
    {%- set reasoning = '' %}
    {%- if '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- shown(message) }}
    {%- if reasoning and loop.index0 > ns.last_query %}
        {{- '\n<think>' + reasoning.strip() + '</think>' }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\n<tool_call>' }}{{ dict(call.function.arguments, name=call.function.name) | tojson(sort_keys=true) }}
        {{- '</tool_call>' }}
    {%- endfor %}
    {{- '\n' + content.strip() + '<|end|>' }}
{% endfor %}
{{- '<' ~ ns.seen ~ ' tool answers>' if ns.seen }}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}""",
    "strict": """{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\n\n' -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set first = "" -%}{%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<turn>' + role + '\n' + (first if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<turn/>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<turn>model\n'}}{%- endif -%}
""",
    "answers in a macro": """{% macro answer(m) %}
{% generation %}{{ m.content or '' }}</s>{% endgeneration %}
{% endmacro %}
{% for m in messages %}
  {% if m.role == 'assistant' %}
[A]{{ answer(m) }}[/A]
  {% else %}
[{{ m.role | upper }}] {{ m.content | tojson }} {{ loop.index }}/{{ loop.length }}
  {% endif %}
{% endfor %}
{{ {'n': messages | length, 'roles': messages | map(attribute='role') | list} | tojson(separators=(',', ':')) }}
""",
}  # fmt: skip


def transformers_renders() -> dict[str, dict[str, str | None]]:
    """What transformers renders on `DATE`, by template and conversation; None where the template refuses."""
    from datetime import datetime
    from unittest import mock

    import jinja2
    from transformers.utils import chat_template_utils

    class Frozen(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(DATE)

    found, render = {}, chat_template_utils.render_jinja_template
    with mock.patch.object(chat_template_utils, "datetime", Frozen):
        for template, text in TEMPLATES.items():
            found[template] = {}
            for name, (messages, arguments) in CONVERSATIONS.items():
                arguments = {"tools": None, **arguments}
                kept = [{key: value for key, value in one.items() if value is not None} for one in messages]
                try:
                    whole, _ = render([kept], chat_template=text, **arguments, **MARKS)
                    found[template][name] = whole[0]
                except jinja2.TemplateError:
                    found[template][name] = None
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(transformers_renders(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
