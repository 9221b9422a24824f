"""Templates in the shape of real families', conversations, and what of each is learned, written without Jinja.

A function beside a template writes its text by hand: it yields pieces (text, number of the message that is learned
there, or None). Which answers share a row is written by hand as well. Nothing here uses the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

DATE = "2026-07-26T09:05:00"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "The weather at a place",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}  # fmt: skip
_CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}


def _turn(role: str, content: str | None, **more) -> dict:
    return {"role": role, **({} if content is None else {"content": content}), **more}


# name: (messages, tools)
CONVERSATIONS: dict[str, tuple[list[dict], list | None]] = {
    "system": ([_turn("system", "Be brief."), _turn("user", "Hello?"), _turn("assistant", "Hi.")], None),
    "turns": (
        [_turn("user", "One?"), _turn("assistant", "1, one\n\nand only"), _turn("user", " Two? "),
         _turn("assistant", " 2 \n"), _turn("user", "Three?"), _turn("assistant", "\n\n3")],
        None,
    ),
    "tools": (
        [_turn("user", "Weather?"), _turn("assistant", None, tool_calls=[_CALL]), _turn("tool", "21 °C"),
         _turn("assistant", "It is 21 °C."), _turn("user", "Thanks."), _turn("assistant", "Welcome.")],
        [WEATHER],
    ),
    "thinking": (
        [_turn("user", "2+2?"), _turn("assistant", "4", reasoning_content="Two and two."), _turn("user", "Sure?"),
         _turn("assistant", "Yes.", reasoning_content="I am.")],
        None,
    ),
    "tools and thoughts": (
        [_turn("user", "Weather?"), _turn("assistant", "Let me see.", reasoning_content="Where?", tool_calls=[_CALL]),
         _turn("tool", "21 °C"), _turn("assistant", "It is 21 °C.", reasoning_content="Warm.")],
        [WEATHER],
    ),
    "empty thinking": (
        [_turn("user", "2+2?"), _turn("assistant", "4", reasoning_content=""), _turn("user", "Sure?"),
         _turn("assistant", "Yes.", reasoning_content="")],
        None,
    ),
    "prefix answer": (
        [_turn("user", "Sky?"), _turn("assistant", "Blue."), _turn("user", "Sea?"),
         _turn("assistant", "The sea is", prefix=True)],
        None,
    ),
    "trailing question": ([_turn("user", "Sky?"), _turn("assistant", "Blue."), _turn("user", "Why?")], None),
    "only system": ([_turn("system", "Be brief.")], None),
}  # fmt: skip
Pieces = Iterator[tuple[str, int | None]]
ALL = "all answers in one row"
EACH = "a row for each answer"


class Case(NamedTuple):
    """A template and its oracle.

    `rows`: which answers share a row, for all conversations, and `but` for some: lists of numbers of messages.
    `refused`: the conversations that the template cannot render. `tokens`: bos and eos of its tokenizer_config.json.
    `ends`: what else ends an answer by its generation_config.json.
    """

    trait: str
    template: str
    write: Callable[[list[dict], list | None], Pieces]
    tokens: dict[str, str]
    rows: str = ALL
    but: dict[str, list[list[int]]] = {}
    refused: tuple[str, ...] = ()
    adds_bos: bool = False
    ends: tuple[str, ...] = ()


def _pretty(tool) -> str:
    return json.dumps(tool, ensure_ascii=False, indent=4)


def _plain(value) -> str:
    return json.dumps(value, ensure_ascii=False)


CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You help.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def write_chatml(messages, tools) -> Pieces:
    if messages[0]["role"] != "system":
        yield "<|im_start|>system\nYou help.<|im_end|>\n", None
    for number, message in enumerate(messages):
        yield f"<|im_start|>{message['role']}\n", None
        yield message["content"] + "<|im_end|>", number if message["role"] == "assistant" else None
        yield "\n", None


UNASKED = """{% for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}"""


def write_unasked(messages, tools) -> Pieces:
    for number, message in enumerate(messages):
        yield f"<|im_start|>{message['role']}\n", None
        yield message["content"] + "<|im_end|>", number if message["role"] == "assistant" else None
        yield "\n", None


TAGGED = """{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- generation -%}
            {{- message.content | default('') -}}
            {%- for call in message.tool_calls or [] -%}
                {{- '<tool_call>' ~ (call.function | tojson) ~ '</tool_call>' -}}
            {%- endfor -%}
        {%- endgeneration -%}
        {{- '<|im_end|>\\n' -}}
    {%- else -%}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def write_tagged(messages, tools) -> Pieces:
    for number, message in enumerate(messages):
        yield f"<|im_start|>{message['role']}\n", None
        calls = "".join(f"<tool_call>{_plain(c['function'])}</tool_call>" for c in message.get("tool_calls", []))
        yield message.get("content", "") + calls + "<|im_end|>", number if message["role"] == "assistant" else None
        yield "\n", None


LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools is not none %}
    {%- set first_user_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {{- "Given the following functions, please respond with a JSON for a function call.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {{- message.content | tojson }}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def write_llama3(messages, tools) -> Pieces:
    system = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
    yield f"<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2026\n\n{system}<|eot_id|>", None
    for number, message in enumerate(messages):
        if message["role"] == "system":
            continue
        name = "ipython" if message["role"] == "tool" else message["role"]
        yield f"<|start_header_id|>{name}<|end_header_id|>\n\n", None
        if number == 0 and tools:
            asked = "Given the following functions, please respond with a JSON for a function call.\n\n"
            yield asked + "".join(_pretty(tool) + "\n\n" for tool in tools), None
        if "tool_calls" in message:
            call = message["tool_calls"][0]["function"]
            text = f'{{"name": "{call["name"]}", "parameters": {_plain(call["arguments"])}}}'
        else:
            text = _plain(message["content"]) if name == "ipython" else message["content"].strip()
        yield text + "<|eot_id|>", number if name == "assistant" else None


GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {{- message['content'] | trim }}
    {{- '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""


def write_gemma(messages, tools) -> Pieces:
    yield "<s>", None
    for number, message in enumerate(messages):
        if message["role"] == "system":
            continue
        role = "model" if message["role"] == "assistant" else message["role"]
        merged = number == 1 and messages[0]["role"] == "system"
        yield f"<start_of_turn>{role}\n" + (messages[0]["content"] + "\n\n" if merged else ""), None
        yield message["content"].strip() + "<end_of_turn>", number if role == "model" else None
        yield "\n", None


MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- tool | tojson }}
                {{- ", " if not loop.last else "]" }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {{- tool_call.function | tojson }}
            {{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | tojson + "}[/TOOL_RESULTS]" }}
    {%- endif %}
{%- endfor %}
"""


def write_mistral(messages, tools) -> Pieces:
    yield "<s>", None
    last = max(number for number, message in enumerate(messages) if message["role"] == "user")
    for number, message in enumerate(messages):
        if message["role"] == "user":
            if tools and number == last:
                yield f"[AVAILABLE_TOOLS] {_plain(tools)}[/AVAILABLE_TOOLS]", None
            # The system prompt stands before a question that has no answer yet, which is what a model is asked.
            unanswered = number == len(messages) - 2 and messages[0]["role"] == "system"
            system = messages[0]["content"] + "\n\n" if unanswered else ""
            yield f"[INST] {system}{message['content']}[/INST]", None
        elif message["role"] == "tool":
            yield f'[TOOL_RESULTS] {{"content": {_plain(message["content"])}}}[/TOOL_RESULTS]', None
        elif "tool_calls" in message:
            yield f"[TOOL_CALLS] {_plain([call['function'] for call in message['tool_calls']])}</s>", number
        elif message["role"] == "assistant":
            yield f" {message['content'].strip()}</s>", number


_QWEN_TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}
        {%- set ns.last_query_index = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
"""
_QWEN_OTHERS = """{%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
"""
QWEN3 = (
    _QWEN_TOOLS
    + """{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + tool_call.function.name + '", "arguments": ' }}
            {{- tool_call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    """
    + _QWEN_OTHERS
    + """{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
)
QWEN35 = (
    _QWEN_TOOLS
    + """{%- if ns.searching %}{{- raise_exception('No user query found in messages.') }}{%- endif %}
{%- for message in messages %}
    {%- set content = (message.content if message.content is string else '') | trim %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = (message.reasoning_content or '') | trim %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\\n\\n' if loop.first and content else '' }}
            {{- '<tool_call>\\n<function=' + tool_call.function.name + '>\\n' }}
            {%- for name, value in tool_call.function.arguments | items %}
                {{- '<parameter=' + name + '>\\n' + value + '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    """
    + _QWEN_OTHERS
    + """{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- else %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}"""
)


def _write_qwen_system(messages, tools) -> Pieces:
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if tools:
        listed = "".join("\n" + _plain(tool) for tool in tools)
        yield f"<|im_start|>system\n{system}# Tools\n\n<tools>{listed}\n</tools><|im_end|>\n", None
    elif system:
        yield f"<|im_start|>system\n{system}<|im_end|>\n", None


def write_qwen3(messages, tools) -> Pieces:
    yield from _write_qwen_system(messages, tools)
    last = max(number for number, message in enumerate(messages) if message["role"] == "user")
    for number, message in enumerate(messages):
        content = message.get("content", "")
        if message["role"] == "user":
            yield f"<|im_start|>user\n{content}<|im_end|>\n", None
        elif message["role"] == "tool":
            yield f"<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n", None
        elif message["role"] == "assistant":
            yield "<|im_start|>assistant\n", None
            thought = message.get("reasoning_content", "")
            if number == len(messages) - 1 or (thought and number > last):
                yield f"<think>\n{thought}\n</think>\n\n", number
                content = content.lstrip("\n")
            for call in message.get("tool_calls", []):
                content += "\n" if content else ""
                named, given = call["function"]["name"], _plain(call["function"]["arguments"])
                content += f'<tool_call>\n{{"name": "{named}", "arguments": {given}}}\n</tool_call>'
            yield content + "<|im_end|>", number
            yield "\n", None


def write_qwen35(messages, tools) -> Pieces:
    yield from _write_qwen_system(messages, tools)
    last = max(number for number, message in enumerate(messages) if message["role"] == "user")
    for number, message in enumerate(messages):
        content = message.get("content", "")
        if message["role"] == "user":
            yield f"<|im_start|>user\n{content.strip()}<|im_end|>\n", None
        elif message["role"] == "tool":
            yield f"<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n", None
        elif message["role"] == "assistant":
            yield "<|im_start|>assistant\n", None
            if number > last:
                yield "<think>\n", None
                yield f"{message.get('reasoning_content', '')}\n</think>\n\n", number
            yield content.strip(), number
            for call in message.get("tool_calls", []):
                yield "\n\n" if content else "", number
                (name, value), = call["function"]["arguments"].items()
                yield f"<tool_call>\n<function={call['function']['name']}>\n<parameter={name}>\n{value}", number
                yield "\n</parameter>\n</function>\n</tool_call>", number
            yield "<|im_end|>", number
            yield "\n", None


R1 = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'system' %}{{ message['content'] }}{% endif %}
{%- if message['role'] == 'user' %}{{'<|User|>' + message['content']}}{% endif %}
{%- if message['role'] == 'assistant' %}
{%- set content = message['content'].split('</think>')[-1] %}{{'<|Assistant|>' + content + '</s>'}}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{'<|Assistant|><think>\\n'}}{% endif %}"""


def write_r1(messages, tools) -> Pieces:
    yield "<s>", None
    for number, message in enumerate(messages):
        yield {"system": "", "user": "<|User|>", "assistant": "<|Assistant|>"}[message["role"]], None
        own = message["role"] == "assistant"
        yield message["content"] + ("</s>" if own else ""), number if own else None


VICUNA = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'system' %}{{ message['content'] + ' ' }}
{%- elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}
{%- elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] }}
{%- if not loop.last %}{{ eos_token }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def write_vicuna(messages, tools) -> Pieces:
    yield "<s>", None
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            yield "ASSISTANT:", None
            yield f" {message['content']}</s>", number  # the last one's end is not the template's
        else:
            yield ("USER: " if message["role"] == "user" else "") + message["content"] + " ", None


ALPACA = """{% for message in messages %}
{%- if message.role == 'assistant' %}{{ '### Response:\\n' + message.content + '\\n\\n' }}
{%- elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}
{%- else %}{{ message.content + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""


def write_alpaca(messages, tools) -> Pieces:
    yield "<s>", None  # the tokenizer's, since the template writes none
    for number, message in enumerate(messages):
        head = {"assistant": "### Response:\n", "user": "### Instruction:\n", "system": ""}[message["role"]]
        yield head, None
        yield message["content"], number if message["role"] == "assistant" else None
        if number == len(messages) - 1:
            yield "</s>", number  # the end that the template lacks
        yield "\n\n", None


ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] | trim + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] | trim + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + message['content'] | trim + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' -}}
{% endif %}
{% endfor %}"""


def write_zephyr(messages, tools) -> Pieces:
    for number, message in enumerate(messages):
        yield f"<|{message['role']}|>", None
        own = number if message["role"] == "assistant" else None
        yield f"\n{message['content'].strip()}</s>", own  # the line break is the model's: the prompt ends before it
        yield "\n", None


HARMONY = """{{- "<|start|>system<|message|>You are a model.\\nCurrent date: " + strftime_now("%Y-%m-%d") + "<|end|>" }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- "<|start|>developer<|message|># Instructions\\n\\n" + message.content + "<|end|>" }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" }}
        {{- call.arguments | tojson + "<|call|>" }}
    {%- elif message.role == 'assistant' and loop.last and not add_generation_prompt %}
        {%- if message.reasoning_content %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.reasoning_content + "<|end|>" }}
        {%- endif %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
    {%- elif message.role == 'assistant' %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
    {%- elif message.role == 'tool' %}
        {{- "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>" + message.content + "<|end|>" }}
    {%- else %}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start|>assistant" }}{%- endif %}"""


def write_harmony(messages, tools) -> Pieces:
    yield "<|start|>system<|message|>You are a model.\nCurrent date: 2026-07-26<|end|>", None
    for number, message in enumerate(messages):
        content = message.get("content")
        if message["role"] == "system":
            yield f"<|start|>developer<|message|># Instructions\n\n{content}<|end|>", None
        elif message["role"] == "user":
            yield f"<|start|>user<|message|>{content}<|end|>", None
        elif message["role"] == "tool":
            yield f"<|start|>functions.weather to=assistant<|channel|>commentary<|message|>{content}<|end|>", None
        else:
            yield "<|start|>assistant", None
            if "tool_calls" in message:
                given = _plain(message["tool_calls"][0]["function"]["arguments"])
                yield f" to=functions.weather<|channel|>commentary json<|message|>{given}<|call|>", number
            elif number == len(messages) - 1:
                if message.get("reasoning_content"):
                    yield f"<|channel|>analysis<|message|>{message['reasoning_content']}<|end|>", number
                    yield "<|start|>assistant", number
                yield f"<|channel|>final<|message|>{content}<|return|>", number
            else:
                yield f"<|channel|>final<|message|>{content}<|end|>", number


TOOLS_LAST = """{%- for message in messages %}
    {%- if message.tool_calls %}
        {{- '<|im_start|>assistant\\n' }}
        {%- for call in message.tool_calls %}{{- call.function.name ~ (call.function.arguments | tojson) }}{% endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
    {%- if tools and (loop.last if add_generation_prompt else loop.revindex == 2) %}
        {{- '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def write_tools_last(messages, tools) -> Pieces:
    for number, message in enumerate(messages):
        yield f"<|im_start|>{message['role']}\n", None
        given = [call["function"] for call in message.get("tool_calls", [])]
        calls = "".join(call["name"] + _plain(call["arguments"]) for call in given)
        own = message["role"] == "assistant"
        yield (calls or message["content"]) + "<|im_end|>", number if own else None
        yield "\n", None
        if tools and number == len(messages) - 2:
            yield f"<|im_start|>tools\n{_plain(tools)}<|im_end|>\n", None


_IM = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
_S = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
_NO_TOOLS = ("tools", "tools and thoughts")
_TOGETHER = {"tools and thoughts": [[1, 3]]}
CASES = {
    "chatml": Case("ChatML; PAD is EOS", CHATML, write_chatml, _IM, refused=_NO_TOOLS),
    "unasked": Case("no words to ask for an answer", UNASKED, write_unasked, _IM, refused=_NO_TOOLS),
    "tagged": Case("a generation tag, the end outside it", TAGGED, write_tagged, _IM),
    "llama 3": Case("states the date, trims, a tool's answer as JSON", LLAMA3, write_llama3,
                    {"bos_token": "<s>", "eos_token": "<|eot_id|>"}),
    "gemma": Case("merges system into the first question, raises on order", GEMMA, write_gemma,
                  {"bos_token": "<s>", "eos_token": "</s>"}, refused=_NO_TOOLS),
    "mistral": Case("tools before the last question, system only before an unanswered one", MISTRAL, write_mistral, _S,
                    but={"tools": [[1, 3], [5]]}),
    "qwen 3": Case("strips thinking from earlier turns, an empty one before the last", QWEN3, write_qwen3, _IM, EACH,
                   but=_TOGETHER),
    "qwen 3.5": Case("asks with an open thought, raises without a question", QWEN35, write_qwen35, _IM, EACH,
                     # Line breaks of an empty thought: after a prompt two tokens, within a later prompt one.
                     but={"tools": [[1], [3], [5]], **_TOGETHER}),
    "r1": Case("asks with an open thought that no answer of its has", R1, write_r1, _S, refused=_NO_TOOLS),
    "vicuna": Case("no EOS at the end", VICUNA, write_vicuna, _S, refused=_NO_TOOLS),
    "alpaca": Case("no EOS at all, no BOS though the tokenizer adds one", ALPACA, write_alpaca, _S, EACH,
                   refused=_NO_TOOLS, adds_bos=True),
    "zephyr": Case("trims; the prompt ends before a line break; forgets calls", ZEPHYR, write_zephyr, _S,
                   refused=_NO_TOOLS),
    "harmony": Case("channels; another end for the last answer", HARMONY, write_harmony,
                    {"bos_token": "<s>", "eos_token": "<|return|>"}, EACH, but={"tools": [[1, 3], [5]], **_TOGETHER},
                    ends=("<|call|>",)),
    "tools last": Case("tools at the end", TOOLS_LAST, write_tools_last, _IM,
                       but={"tools": [[1], [3], [5]], "tools and thoughts": [[1], [3]]}),
}  # fmt: skip
CONTROLS = [
    "<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<|User|>", "<|Assistant|>", "<|start|>", "<|end|>",
    "<|message|>", "<|channel|>", "<|return|>", "<|call|>",
]  # fmt: skip
MATCHED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # added tokens that text may hold


def answers(name: str) -> list[int]:
    """The numbers of the messages that are learned."""
    messages, _ = CONVERSATIONS[name]
    return [n for n, message in enumerate(messages) if message["role"] == "assistant" and not message.get("prefix")]


def wanted(case: Case, name: str) -> list[list[tuple[str, bool]]]:
    """By hand: the rows, each as pieces (text, is it learned) up to the end of its last answer."""
    (messages, tools), numbers, rows = CONVERSATIONS[name], answers(name), []
    groups = case.but.get(name, [numbers] if case.rows == ALL else [[number] for number in numbers])
    for group in groups if numbers else []:
        pieces = [(text, number in group) for text, number in case.write(messages[: group[-1] + 1], tools)]
        rows.append(joined(pieces[: max(n for n, piece in enumerate(pieces) if piece[1]) + 1]))
    return rows


def joined(pieces) -> list[tuple[str, bool]]:
    """Pieces without empty ones, neighbours of one kind as one."""
    made: list[tuple[str, bool]] = []
    for text, learned in pieces:
        if text and made and made[-1][1] == learned:
            made[-1] = made[-1][0] + text, learned
        elif text:
            made.append((text, learned))
    return made
