"""The text of an answer while it is written: whatever the tokens are, it is the decoded text up to a stop."""

from __future__ import annotations

import json

import pytest
from chats import TEMPLATE
from hypothesis import given
from hypothesis import strategies as st

from aurora_train.generate.requests import Token
from aurora_train.serve import calls
from aurora_train.serve.refusal import Refusal
from aurora_train.serve.written import Written
from language.speaking import TextSpeaker
from language.tokenizers import Continuation, Tokenizer

SPEAKER = TextSpeaker(Tokenizer(), {"vocabulary": 257})


def written(text: str, stops=(), with_calls=False) -> tuple[list, Written]:
    """(the pieces of a text that comes byte by byte, the answer)."""
    answer, pieces = Written(SPEAKER, [256], stops, with_calls), []
    for byte in text.encode():
        pieces.append(answer.add(Token(byte)))
        if answer.stopped:
            return pieces, answer
    return [*pieces, answer.close()], answer


@given(st.text("ab\u00e9\u20ac", max_size=30), st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_its_first_stop_and_is_never_taken_back(text, stops):
    pieces, answer = written(text, stops)
    ends = min(((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text), default=None)
    first = ends and ends[1]  # of several, the one that is complete first
    assert "".join(piece.text for piece in pieces) == (text if first is None else text[:first])
    assert answer.stopped == (first is not None)
    shown = [one.start for piece in pieces for one in piece.tokens]
    assert shown == sorted(shown) and all(start < (len(text) if first is None else first) for start in shown)
    if first is None:
        assert len(shown) == len(text.encode()), "every token is told of once"


def test_a_character_is_shown_whole_or_not_at_all():
    pieces, _ = written("a\u20ac\U0001f642")
    assert [piece.text for piece in pieces if piece.text] == ["a", "\u20ac", "\U0001f642"]
    cut = Written(SPEAKER, [256])
    assert [cut.add(Token(byte)).text for byte in "\u20ac".encode()[:2]] == ["", ""]
    assert cut.close().text == "\ufffd", "the model ended within it, and that is shown"


def test_a_stop_within_a_call_ends_it_and_no_part_of_a_call_is_shown_as_text():
    pieces, answer = written("So: <tool_call>{}END", ("END",), with_calls=True)
    assert "".join(piece.text for piece in pieces) == "So: " and answer.calls == "<tool_call>{}" and answer.stopped
    pieces, answer = written("a < b and <tool", (), with_calls=True)
    assert "".join(piece.text for piece in pieces) == "a < b and <tool" and not answer.calls


def test_a_long_continuation_is_the_decoded_text():
    tokenizer, text = Tokenizer(), "\u20ac1 and \u00e9 \U0001f642. " * 40
    writing = Continuation(tokenizer, "It costs ")
    assert "".join(writing.add([number]) for number in tokenizer.encode(text)) == text == writing.text


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"s": {"type": "string"}}}}}]


@pytest.mark.parametrize(
    "text,arguments",
    [
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', [{"a": 1}]),
        ('<tool_call>{"name": "add"}</tool_call>\n<tool_call>{"name": "add", "arguments": {}}</tool_call>', [{}, {}]),
        ("<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=s>\n2\n</parameter>\n</function>\n"
         "</tool_call>", [{"a": 1, "s": "2"}]),
        ("<tool_call>{broken</tool_call>", None),
        ('<tool_call>{"name": 1, "arguments": {}}</tool_call>', None),
        ('<tool_call>{"name": "add", "arguments": {}}', None),
        ('<tool_call>{"name": "add", "arguments": {}}</tool_call> and more', None),
    ],
)  # fmt: skip
def test_calls_are_read_in_both_forms_or_not_at_all(text, arguments):
    found = calls.read(text, TOOLS)
    assert arguments == (found and [json.loads(call["function"]["arguments"]) for call in found])


def test_tools_are_taken_only_where_the_template_presents_them_and_has_calls_written():
    presents = "{% if tools %}{{ tools | tojson }} Answer with <tool_call>.{% endif %}" + TEMPLATE
    asked = [{"role": "user", "content": "Add."}]
    for template, known in ((presents, True), (TEMPLATE, False), (TEMPLATE + "{# <tool_call> #}", False)):
        speaker = TextSpeaker(Tokenizer(), {"vocabulary": 257}, template)
        assert speaker.calls_tools is known and speaker.converses
        assert ('"name": "add"' in speaker.text(speaker.asked(asked, TOOLS))) is known
    assert not SPEAKER.converses and not SPEAKER.calls_tools
    with pytest.raises(Refusal, match="does not know tools"):
        calls.refuse_unknown(TOOLS, None, known=False)
    assert calls.refuse_unknown(TOOLS, "auto", known=True) and not calls.refuse_unknown(TOOLS, "none", known=False)
