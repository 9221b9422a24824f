"""The bundled tasks: always the same rows, and one right answer to each."""

import re

import pytest

from aurora_train.errors import UserError
from language import conversations, tasks
from language.settings_tune import ConversationDataConfig

MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = {"half past": 30, "quarter past": 15, "quarter to": -15}


def read(note):
    """The line of a calendar for a note, by other means than the task's."""
    month = next(number for number, name in enumerate(MONTHS, 1) if name in note)
    day = int(re.search(rf"(?:(\d+)(?:st|nd|rd|th)? (?:of )?{MONTHS[month - 1]}|{MONTHS[month - 1]} (\d+))", note)
              .expand(r"\1\2"))  # fmt: skip
    half = re.search(r"(?:(half past|quarter past|quarter to) )?(\d+)(?::(\d\d))? ?(am|pm)", note)
    if half:
        words, hour, minute, noon = half.groups()
        minutes = (int(hour) % 12) * 60 + int(minute or 0) + NUMBERS.get(words, 0)
        minutes += 720 if noon == "pm" else 0
    else:
        hour, minute = re.search(r"(\d+):(\d\d)", note).groups()
        minutes = int(hour) * 60 + int(minute)
    surname = re.search(r"([A-Z][a-z]+) ([A-Z][a-z]+)(?:[.:]| on | confirmed|$)", note).group(2)
    return f"{month:02}-{day:02} {minutes // 60:02}:{minutes % 60:02} {surname}"


@pytest.fixture(scope="module")
def rows():
    return {name: tasks.rows(name) for name in ("calendar", "calendar-pairs", "calendar-judged")}


def test_every_answer_is_right_and_every_near_miss_is_not(rows):
    for row in rows["calendar"]:
        _, question, answer = (message["content"] for message in row["messages"])
        assert answer == read(question), question
    for row in rows["calendar-pairs"]:
        right, wrong = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert right == read(row["prompt"][1]["content"]) != wrong
        assert re.fullmatch(r"\d\d-\d\d \d\d:\d\d [A-Z][a-z]+", wrong) and len(set(zip(right, wrong, strict=False))) > 1
    for row in rows["calendar-judged"]:
        assert (row["completion"][0]["content"] == read(row["prompt"][1]["content"])) is row["label"]


def test_the_notes_are_all_different_and_no_task_has_another_s(rows):
    notes = [[(row.get("messages") or row.get("prompt"))[1]["content"] for row in each] for each in rows.values()]
    assert [len(set(each)) for each in notes] == [tasks.ROWS] * 3
    assert len(set().union(*notes)) == 3 * tasks.ROWS


def test_a_source_reads_a_task(tmp_path, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path))
    for name, reader in (("calendar", conversations.read), ("calendar-pairs", conversations.read_pairs),
                         ("calendar-judged", conversations.read_judged)):  # fmt: skip
        data = ConversationDataConfig(source=f"task:{name}", max_rows=5)
        (source,) = conversations.sources(data).values()
        assert len(list(reader(source, data))) == 5
    # Another content is other data, and a run would be refused: change it only with the name.
    assert tasks.table("calendar").name == "calendar-ef89a61f41ba5823.jsonl"
    with pytest.raises(UserError, match="no bundled task 'calender'(?s:.*)task:calendar"):
        conversations.sources(ConversationDataConfig(source="task:calender"))


def test_rows_of_a_task_that_a_mixture_holds_twice_have_places_of_their_own(tmp_path, monkeypatch):
    """KTO finds the label of a piece by its place: one of another source would be wrong, and nothing would say so."""
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path))
    part = {"source": "task:calendar-judged", "max_rows": 3}
    data = ConversationDataConfig(mix={"a": part, "b": part})
    places = [row.place for source in conversations.sources(data).values()
              for row in conversations.read_judged(source, data)]  # fmt: skip
    assert len(set(places)) == 6 and places[0].split(" of ")[1].startswith("a/calendar-judged")
