"""Templates in the shape of real families, and the texts that they write, written without Jinja.

A function beside a template writes its text by hand: it yields pieces (text, number of the message that is learned
there, or None). They share nothing with the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

Pieces = Iterator[tuple[str, int | None]]


def _pretty(tool) -> str:
    return json.dumps(tool, ensure_ascii=False, indent=4)


def plain(value) -> str:
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
        calls = "".join(f"<tool_call>{plain(c['function'])}</tool_call>" for c in message.get("tool_calls", []))
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
            text = f'{{"name": "{call["name"]}", "parameters": {plain(call["arguments"])}}}'
        else:
            text = plain(message["content"]) if name == "ipython" else message["content"].strip()
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
                yield f"[AVAILABLE_TOOLS] {plain(tools)}[/AVAILABLE_TOOLS]", None
            # The system prompt stands before a question that has no answer yet, which is what a model is asked.
            unanswered = number == len(messages) - 2 and messages[0]["role"] == "system"
            system = messages[0]["content"] + "\n\n" if unanswered else ""
            yield f"[INST] {system}{message['content']}[/INST]", None
        elif message["role"] == "tool":
            yield f'[TOOL_RESULTS] {{"content": {plain(message["content"])}}}[/TOOL_RESULTS]', None
        elif "tool_calls" in message:
            yield f"[TOOL_CALLS] {plain([call['function'] for call in message['tool_calls']])}</s>", number
        elif message["role"] == "assistant":
            yield f" {message['content'].strip()}</s>", number


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
        calls = "".join(call["name"] + plain(call["arguments"]) for call in given)
        own = message["role"] == "assistant"
        yield (calls or message["content"]) + "<|im_end|>", number if own else None
        yield "\n", None
        if tools and number == len(messages) - 2:
            yield f"<|im_start|>tools\n{plain(tools)}<|im_end|>\n", None
