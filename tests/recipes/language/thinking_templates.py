"""Templates of models that think, and the texts that they write, written without Jinja.

A function beside a template writes its text by hand: it yields pieces (text, number of the message that is learned
there, or None). They share nothing with the code under test.
"""

from __future__ import annotations

from answer_templates import Pieces, plain

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
        listed = "".join("\n" + plain(tool) for tool in tools)
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
                named, given = call["function"]["name"], plain(call["function"]["arguments"])
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
                given = plain(message["tool_calls"][0]["function"]["arguments"])
                yield f" to=functions.weather<|channel|>commentary json<|message|>{given}<|call|>", number
            elif number == len(messages) - 1:
                if message.get("reasoning_content"):
                    yield f"<|channel|>analysis<|message|>{message['reasoning_content']}<|end|>", number
                    yield "<|start|>assistant", number
                yield f"<|channel|>final<|message|>{content}<|return|>", number
            else:
                yield f"<|channel|>final<|message|>{content}<|end|>", number
