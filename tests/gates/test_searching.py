"""What the gates find in texts, without a run; and the section `gates` of a config."""

from __future__ import annotations

import json

import pytest

from aurora_train.config import load
from aurora_train.errors import UserError
from aurora_train.gates import decontamination, secrets

ITEM = "the quick brown fox jumps over the lazy dog while thirteen words are needed here"
HAN = "我们在北京的大学里学习机器翻译的方法"


@pytest.mark.parametrize(("text", "found"), [
    (ITEM, True), (f"so: {ITEM.upper()}!", True), (ITEM.replace(" ", ",\n\t"), True), (ITEM[: len(ITEM) // 2], False),
    (ITEM.replace("lazy", "idle"), False), ("", False), (f"前{HAN}后", True), (HAN[::-1], False),
])  # fmt: skip
def test_an_item_is_found_by_its_words_in_a_row(tmp_path, text, found):
    (tmp_path / "set.jsonl").write_text(
        "".join(json.dumps({"q": one, "more": {"n": 1}}) + "\n" for one in (ITEM, HAN)), encoding="utf-8")
    (outcome,) = decontamination.search({"s": str(tmp_path / "set.jsonl")}, 13, [("a", "else"), ("b", text)]).values()
    assert outcome.searched == 2 and list(outcome.found.values()) == (["b"] if found else [])


def test_sets_of_every_kind_are_read_and_one_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text(f"question,answer\n{ITEM},yes\n")
    (tmp_path / "b.txt").write_text(ITEM)
    (tmp_path / "c.json").write_text(json.dumps([{"turns": [{"content": ITEM}]}]))
    assert {ITEM in text for _, text in decontamination.items(str(tmp_path))} == {True}
    assert len(list(decontamination.items(str(tmp_path)))) == 3
    with pytest.raises(UserError, match="no such file"):
        list(decontamination.items(str(tmp_path / "none")))


@pytest.mark.parametrize(("text", "kind"), [
    ("id = " + "AKIA" + "IOSFODNN7EXAMPLE", "AWS Access Key"), ("-----BEGIN RSA " + "PRIVATE KEY-----", "Private Key"),
    ("ghp" + "_" + "a1B2" * 9, "GitHub Token"), ("xoxb" + "-1234-5678-abcdef", "Slack Token"),
    ("password = 'correct horse'", None), ("sha256 " + "0123456789abcdef" * 4, None), ("user@example.org", None),
])  # fmt: skip
def test_a_key_of_a_known_format_is_found_with_its_line_and_not_shown(text, kind):
    found = list(secrets.search([("a.txt", f"first\n{text}\n")]))
    assert [line.split(": ")[1].split(" (")[0] for line in found] == ([kind] if kind else [])
    assert all(line.startswith("a.txt:2: ") and text not in line for line in found)


@pytest.mark.parametrize(("override", "words"), [
    ("gates.score={bits_per_byte: {}}", "needs a min, a max, or both"), ("gates.licences=[MIT]", "licence"),
    ("gates.decontamination={ngram: 8}", "at least one evaluation set"),
    ("gates.score={x: {min: 2, max: 1}}", "nothing is at least 2 and at most 1"),
])  # fmt: skip
def test_a_mistake_in_the_section_is_one_message(override, words):
    with pytest.raises(UserError) as fault:
        load("quickstart", [override])
    assert words in str(fault.value)


def test_gates_that_search_texts_are_refused_for_a_recipe_without_any():
    with pytest.raises(UserError, match="trains on no texts"):
        load("vision/digits", ["gates.secrets=true"])
    assert load("vision/digits", ["gates.licence=[MIT]"]).gates.licence == ["MIT"]
