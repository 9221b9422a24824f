"""Chat templates: rendered as transformers renders them, in a sandbox, with a date that stays."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from conversations import CONVERSATIONS, DATE, FILE, MARKS, TEMPLATES, said, transformers_renders

from aurora_train.errors import UserError
from aurora_train.interop.templates import ChatTemplate

NOW = datetime.fromisoformat(DATE)
STORED = json.loads(FILE.read_text(encoding="utf-8"))


def template(text: str) -> ChatTemplate:
    return ChatTemplate(text, MARKS, NOW, "t.jinja")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_conversation_is_rendered_as_by_transformers(name, conversation):
    messages, arguments = CONVERSATIONS[conversation]
    wanted = STORED[name][conversation]
    if wanted is None:
        with pytest.raises(UserError, match="the template refuses this conversation: Conversation roles must"):
            template(TEMPLATES[name]).render(messages, **arguments)
    else:
        assert template(TEMPLATES[name]).render(messages, **arguments).text == wanted


def test_the_stored_texts_tell_the_conversations_apart():
    for name, texts in STORED.items():
        assert len(set(texts.values())) >= 11, name
    assert [name for texts in STORED.values() for name, text in texts.items() if text is None] == ["a tool's answer"]


@pytest.mark.slow
def test_the_stored_texts_are_those_of_the_installed_transformers():
    pytest.importorskip("transformers")
    assert transformers_renders() == STORED


@pytest.mark.parametrize("name", ["chatml", "answers in a macro"])
def test_the_answers_are_known_by_their_place_in_the_text(name):
    rendered = template(TEMPLATES[name]).render(said("a", "first", "b", "second one", system="s"))
    end = "<|im_end|>" if name == "chatml" else "</s>"
    assert [rendered.text[start:stop] for start, stop in rendered.answers] == [f"first{end}", f"second one{end}"]
    assert template(TEMPLATES[name]).marks_answers and not template(TEMPLATES["dated"]).marks_answers
    assert template(TEMPLATES["dated"]).render(said("a", "b")).answers == []


def test_an_answer_that_holds_what_the_template_writes_is_still_in_its_place():
    rendered = template(TEMPLATES["chatml"]).render(said("x", "{% generation %}<|im_end|>", "y", ""))
    assert [rendered.text[a:b] for a, b in rendered.answers] == ["{% generation %}<|im_end|><|im_end|>", "<|im_end|>"]


def test_a_template_that_changes_an_answer_afterwards_is_refused():
    inner = "{% generation %}{{ m.content }}{% endgeneration %}"
    text = "{% macro a(m) %}" + inner + "{% endmacro %}{{ a(messages[0]) | length }}"
    with pytest.raises(UserError, match="cannot tell which part"):
        template(text).render(said("four"))


def test_the_date_is_the_one_that_was_given():
    assert template("{{ strftime_now('%Y-%m-%d %H:%M') }}").render(said("x")).text == "2026-07-26 09:05"


@pytest.mark.parametrize(
    "text,where,says",
    [
        ("one\n{% if %}", "t.jinja:2", "not a valid template"),
        ("{% for m in messages %}", "t.jinja:1", "endfor"),
        ("{{ messages | unheard_of }}", "t.jinja:1", "unheard_of"),
        ("{% generation %}x", "t.jinja:1", "endgeneration"),
        ("a\n\n{{ messages[0].nothing.more }}", "t.jinja:3", "fails"),
        ("{{ 1 + messages[0].content }}", "t.jinja:1", "fails"),
        ("{{ unheard_of() }}", "t.jinja:1", "unheard_of"),
        ("{{ ''.__class__ }}", "t.jinja", "is not safe: it reads '__class__' of a str"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "t.jinja", "is not safe"),
        ("{{ messages[0]['content'].__init__.__globals__ }}", "t.jinja", "is not safe"),
        ("{{ (messages | first) | attr('__class__') }}", "t.jinja", "is not safe"),
        ("{{ messages.append(1) }}", "t.jinja", "is not safe"),
        ("{{ namespace(_x=1) }}", "t.jinja", "is not safe"),
        ("{{ raise_exception('only in German') }}", "t.jinja", "refuses this conversation: only in German"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "t.jinja:1", "Range too big"),
        ("{{ 'a' * 10 ** 10 }}", "t.jinja:1", "repeats something 10,000,000,000 times"),
        ("{{ 9 ** (9 ** 9) }}", "t.jinja:1", "to the power 387,420,489"),
        ("{{ (2 ** 4999) * (2 ** 4999) * 2 }}", "t.jinja:1", "a number of more than 10,000 bits"),
        ("{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", "t.jinja", "longer than 67,108,864 characters"),
        ("{% include 'other' %}", "t.jinja:1", "fails"),
    ],
)
def test_a_bad_template_ends_in_one_message_that_names_its_line(text, where, says):
    with pytest.raises(UserError) as caught:
        template(text).render(said("hello"))
    assert caught.value.where == where and says in str(caught.value)


TWICE = "{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) if j < 0 %}{% endfor %}{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% continue %}{% endfor %}{% endfor %}",
        "{% for i in [25] recursive %}{{ loop([i - 1, i - 1]) if i }}{% endfor %}",
        "{% macro f(n) %}" + TWICE + "{% endmacro %}{{ f(25) }}",
        "{% set n = namespace(left=25) %}{% block f scoped %}{% if n.left %}{% set n.left = n.left - 1 %}"
        "{{ self.f() }}{{ self.f() }}{% set n.left = n.left + 1 %}{% endif %}{% endblock %}",
        "{% macro f(n) %}{% call g(n) %}{% endcall %}{% endmacro %}{% macro g(n) %}{{ caller() }}"
        "{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(25) }}",
    ],
)
def test_a_text_may_not_take_longer_than_its_time(text):
    limited = ChatTemplate("{{ messages | length }}\n" + text, MARKS, NOW, "t.jinja", seconds=0.02)
    with pytest.raises(UserError, match="^t.jinja:2: the template fails: its text takes longer than 0.02 s") as caught:
        limited.render(said("hello"))
    assert caught.value.where == "t.jinja:2"


def test_long_loops_that_have_an_end_are_rendered():
    turns = said(*map(str, range(2000)))
    for name in ("chatml", "thinking"):
        assert template(TEMPLATES[name]).render(turns).text.count("1999") == 1
    pairs = "{% for m in messages %}{% for o in messages if o == m %}{{ o.content }}{% endfor %}{% endfor %}"
    assert template(pairs).render(turns[:300]).text == "".join(map(str, range(300)))


def test_the_time_of_a_thread_is_its_own_and_so_are_its_answers():
    shared = ChatTemplate(TEMPLATES["answers in a macro"], MARKS, NOW, seconds=0.5)
    talks = [said("a", f"answer {n}", "b", f"and {n * n}") for n in range(64)]
    with ThreadPoolExecutor(4) as pool:
        for talk, rendered in zip(talks, pool.map(shared.render, talks), strict=True):
            wanted = [f"{message['content']}</s>" for message in talk[1::2]]
            assert [rendered.text[start:stop] for start, stop in rendered.answers] == wanted


@pytest.mark.parametrize("message", ["hello", {"content": "x"}, {"role": 3, "content": "x"}, None])
def test_a_message_without_a_role_is_refused_by_its_number(message):
    with pytest.raises(UserError) as caught:
        template(TEMPLATES["chatml"]).render([*said("a"), message])
    assert caught.value.where == "messages[1]"
