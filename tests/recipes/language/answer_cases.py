"""Templates in the shape of real families', conversations, and what of each is learned, written without Jinja.

Which answers share a row is written by hand. Nothing here uses the code under test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import answer_templates as plain
import thinking_templates as thinking
from answer_templates import Pieces

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


_IM = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
_S = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
_NO_TOOLS = ("tools", "tools and thoughts")
_TOGETHER = {"tools and thoughts": [[1, 3]]}
CASES = {
    "chatml": Case("ChatML; PAD is EOS", plain.CHATML, plain.write_chatml, _IM, refused=_NO_TOOLS),
    "unasked": Case("no words to ask for an answer", plain.UNASKED, plain.write_unasked, _IM, refused=_NO_TOOLS),
    "tagged": Case("a generation tag, the end outside it", plain.TAGGED, plain.write_tagged, _IM),
    "llama 3": Case("states the date, trims, a tool's answer as JSON", plain.LLAMA3, plain.write_llama3,
                    {"bos_token": "<s>", "eos_token": "<|eot_id|>"}),
    "gemma": Case("merges system into the first question, raises on order", plain.GEMMA, plain.write_gemma,
                  {"bos_token": "<s>", "eos_token": "</s>"}, refused=_NO_TOOLS),
    "mistral": Case("tools before the last question, system only before an unanswered one", plain.MISTRAL,
                    plain.write_mistral, _S, but={"tools": [[1, 3], [5]]}),
    "qwen 3": Case("strips thinking from earlier turns, an empty one before the last", thinking.QWEN3,
                   thinking.write_qwen3, _IM, EACH, but=_TOGETHER),
    "qwen 3.5": Case("asks with an open thought, raises without a question", thinking.QWEN35,
                     thinking.write_qwen35, _IM, EACH,
                     # Line breaks of an empty thought: after a prompt two tokens, within a later prompt one.
                     but={"tools": [[1], [3], [5]], **_TOGETHER}),
    "r1": Case("asks with an open thought that no answer of its has", thinking.R1, thinking.write_r1, _S,
               refused=_NO_TOOLS),
    "vicuna": Case("no EOS at the end", plain.VICUNA, plain.write_vicuna, _S, refused=_NO_TOOLS),
    "alpaca": Case("no EOS at all, no BOS though the tokenizer adds one", plain.ALPACA, plain.write_alpaca, _S, EACH,
                   refused=_NO_TOOLS, adds_bos=True),
    "zephyr": Case("trims; the prompt ends before a line break; forgets calls", plain.ZEPHYR, plain.write_zephyr, _S,
                   refused=_NO_TOOLS),
    "harmony": Case("channels; another end for the last answer", thinking.HARMONY, thinking.write_harmony,
                    {"bos_token": "<s>", "eos_token": "<|return|>"}, EACH, but={"tools": [[1, 3], [5]], **_TOGETHER},
                    ends=("<|call|>",)),
    "tools last": Case("tools at the end", plain.TOOLS_LAST, plain.write_tools_last, _IM,
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
