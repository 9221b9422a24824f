"""Conversations, preferences and judged answers, read from tables in the formats in which they are usually kept.

`sources` lists the files, `read`, `read_pairs` and `read_judged` yield their rows. Free of jax and numpy. A row that
cannot be used is refused by file and line (Parquet, Arrow: by row, from 1) and by its key; with `data.damaged:
leave_out` it is left out, and its reason can be counted. A row from which nothing can be learned (no answer, no text)
is always left out, and a row without a label that is true or false always refused.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from aurora_train.errors import UserError
from aurora_train.sources.readers import LeftOut
from language import conversation_files
from language.corpus import Corpus
from language.row_formats import FIELDS, FORMATS, TUNED, Row, fitting, missing_field
from language.settings_tune import ConversationDataConfig, check_conversations
from language.turns import BadRow, type_of

log = logging.getLogger("aurora_train")
Say = Callable[[str], None]
_READ_BY = {"pairs": "objective.loss=dpo learns from such rows", "judged": "objective.loss=kto learns from such rows"}
_TELLING = 100  # first rows that decide the format


class Conversation(NamedTuple):
    """One row of the data. Exactly one of `messages` and `parts` is set.

    Messages are normalised: `role` is system, developer, user, assistant or tool; `content` is a str (absent beside
    tool calls alone); thinking is `reasoning_content`; a call's `arguments` are a dict.
    """

    place: str  # "line 12 of chats.jsonl" or "row 12 of chats.parquet", for messages to the user
    messages: list[dict] | None = None  # role, content, and what a template reads: tool_calls, name ...
    tools: list | None = None  # JSON schemas, or None
    parts: list[tuple[str, bool]] | None = None  # without template: (text, is it learned)
    context: int = 0  # of the messages, so many at the beginning are not learned, not even their answers


class Pair(NamedTuple):
    """Two answers to one prompt. Each answer is one assistant message, or several with a tool's between them."""

    place: str
    prompt: list[dict]
    chosen: list[dict]
    rejected: list[dict]
    tools: list | None = None

    def conversations(self) -> tuple[Conversation, Conversation]:
        """(prompt and chosen, prompt and rejected), of which only the answer is learned."""
        return tuple(
            Conversation(self.place, self.prompt + answer, self.tools, context=len(self.prompt))
            for answer in (self.chosen, self.rejected)
        )


class Judged(NamedTuple):
    """An answer to a prompt, and whether it is a good one."""

    place: str
    prompt: list[dict]
    answer: list[dict]
    label: bool
    tools: list | None = None

    @property
    def messages(self) -> list[dict]:
        """The prompt and the answer."""
        return self.prompt + self.answer

    def conversation(self) -> Conversation:
        """Prompt and answer, of which only the answer is learned."""
        return Conversation(self.place, self.messages, self.tools, context=len(self.prompt))


def sources(data: ConversationDataConfig, base: Path | None = None, say: Say = log.warning) -> dict[str, Corpus]:
    """The listed files of each source by its name in `data.mix`, sorted; of a single source by "".

    `Corpus.listing(cache, progress)` gives their hashes. Relative paths start at `base`, the config file's folder.
    `say` receives lines on what is not read. Raises UserError for a source that is not there or holds no table.
    """
    check_conversations(data)
    parts = sorted(data.mix.items()) or [("", data)]
    return {name: conversation_files.opened(part, name, data.online, base, say) for name, part in parts}


def read(source: Corpus, data: ConversationDataConfig, say: Say = log.warning) -> Iterator[Conversation | LeftOut]:
    """The rows of one of the `sources`, in order; LeftOut is the reason why one is left out, to be counted.

    `say` receives a line on the format that was decided. Raises UserError for a row that cannot be read or is no
    conversation, unless `data.damaged` is leave_out; for rows of which nobody can tell the format; and for a source
    without any conversation.
    """
    for place, fields in _read(source, data, TUNED, say):
        yield fields if isinstance(fields, LeftOut) else Conversation(place, **fields)


def read_pairs(source: Corpus, data: ConversationDataConfig, say: Say = log.warning) -> Iterator[Pair | LeftOut]:
    """As `read`, for rows of prompt, chosen and rejected."""
    for place, fields in _read(source, data, ("pairs",), say):
        yield fields if isinstance(fields, LeftOut) else Pair(place, **fields)


def read_judged(source: Corpus, data: ConversationDataConfig, say: Say = log.warning) -> Iterator[Judged | LeftOut]:
    """As `read`, for rows of prompt, completion and label, or messages and label. A row without a label that is true
    or false is always refused."""
    for place, fields in _read(source, data, ("judged",), say):
        yield fields if isinstance(fields, LeftOut) else Judged(place, **fields)


def check(data: ConversationDataConfig, base: Path | None = None, reader: Callable = read) -> None:
    """Raise the UserError that reading the first rows of each source would raise. `reader`: one of the three above."""
    for source in sources(data, base, say=lambda *_: None).values():
        if not source.hub:
            for _ in itertools.islice(reader(source, data, say=lambda *_: None), _TELLING):
                pass


def are_in(path: str) -> bool:
    """Whether the first row of the tables at a path is a conversation of messages, which only a template can read."""
    data = ConversationDataConfig(source=path)
    try:
        (source,) = sources(data, say=lambda *_: None).values()
        first = next(read(source, data, say=lambda *_: None))
    except UserError:
        return False
    return isinstance(first, Conversation) and first.messages is not None


def _read(
    source: Corpus, data: ConversationDataConfig, formats: tuple[str, ...], say: Say
) -> Iterator[tuple[str, dict | LeftOut]]:
    """(place, the fields of its Conversation, Pair or Judged) of every row."""
    part = data.mix[source.key.removeprefix("data.mix.")] if data.mix else data
    if formats != TUNED and part.format != "auto":
        raise UserError("only conversations have a format", where=f"{source.key}.format", hint="leave it out",
                        why=f"this recipe reads {FORMATS[formats[0]].means}")  # fmt: skip
    columns = tuple(part.fields.get(name, name) for name in FIELDS)
    rows = itertools.islice(conversation_files.objects(source, columns), part.max_rows)
    first = list(itertools.islice(rows, _TELLING))
    given = part.format if formats == TUNED else formats[0]
    kind = given if given != "auto" else _decided(first, part.fields, formats, source, data, say)
    reasons, good = Counter(), 0
    for place, values, names in itertools.chain(first, rows):
        try:
            row = _row(values, part.fields)
            _check_format(row, kind, given == "auto", names, source.key)
            fields = FORMATS[kind].parse(row)
        except BadRow as bad:
            if bad.always or data.damaged == "refuse":
                raise bad.refusal(place) from bad
            fields = LeftOut(bad.reason)
        if isinstance(fields, LeftOut):
            reasons[str(fields)] += 1
        good += not isinstance(fields, LeftOut)
        yield place, fields
    if not good:
        why = "; ".join(f"{number:,} {reason}" for reason, number in sorted(reasons.items()))
        what = f"no row of {source.name} can be learned from" if reasons else f"{source.name} holds no rows"
        hint = "`role: assistant` marks what is learned; data.damaged=refuse names the first row that is left out"
        raise UserError(what, where=f"{source.key}.source", why=why or None, hint=hint if reasons else None)


def _row(values: object, columns: dict[str, str]) -> Row:
    if isinstance(values, LeftOut):
        raise BadRow(str(values), "", f"the row cannot be read: {values}")
    if not isinstance(values, dict):
        raise BadRow("not an object", "", f"the row is {type_of(values)}, not an object with fields",
                     hint='{"messages": [{"role": "user", "content": "Hello"}, ...]}')  # fmt: skip
    return Row(values, columns)


def _decided(first: list, columns: dict[str, str], formats: tuple[str, ...], source: Corpus, data, say: Say) -> str:
    """The format of the first row that has one. UserError if it has several, or if none of the `first` rows has any."""
    unknown = None
    for place, values, names in first:
        try:
            row = _row(values, columns)
            found = fitting(row)
            if not found:
                raise missing_field(row, formats, names(), source.key)
        except BadRow as bad:
            bad.always = data.damaged != "refuse"
            unknown = unknown or bad.refusal(place)
            if not bad.always:
                raise unknown from bad
            continue
        if len(found) == 1 and found[0] in formats:
            say(f"{source.name}: the rows are read as `{found[0]}`: {FORMATS[found[0]].means}")
            return found[0]
        raise _undecided(found, formats, source.key).refusal(place)
    raise unknown or UserError(f"{source.name} holds no rows", where=f"{source.key}.source")


def _undecided(found: list[str], formats: tuple[str, ...], key: str) -> BadRow:
    """The error for a row of several formats, or of one that another recipe reads."""
    usable = [name for name in found if name in formats]
    words = " and of ".join(f"`{name}` ({FORMATS[name].means})" for name in found)
    return BadRow(
        "fields of several formats", "", f"the row has the fields of {words}",
        why="only one format of a row is read" if usable else "this recipe learns from conversations",
        hint=f"{key}.format={usable[0]}" if usable else "recipe: language/prefer learns from preferences", always=True,
    )  # fmt: skip


def _check_format(row: Row, kind: str, is_auto: bool, names: Callable[[], list[str]], key: str) -> None:
    """Raise BadRow for a row without the fields of the format, or (`is_auto`) with those of another one too."""
    fits = FORMATS[kind].fits(row)
    if fits and not is_auto:
        return
    found = fitting(row)
    if found != [kind] and found and (is_auto or kind in TUNED):
        raise BadRow(
            "of another format", FORMATS[found[0]].needs[0][0],
            f"the row has the fields of {' and of '.join(f'`{name}`' for name in found)}, but the rows are read as "
            f"`{kind}`", why="the rows of a source are of one format",
            hint="data.mix holds several sources, each of a format of its own",
        )  # fmt: skip
    if not fits and kind not in TUNED and found not in ([], ["text"]):
        raise BadRow(
            "of another format", "", f"the row has {FORMATS[found[0]].means}, not {FORMATS[kind].means}",
            hint=_READ_BY.get(found[0], "recipe: language/tune learns from conversations"),
        )  # fmt: skip
    if not fits:
        raise missing_field(row, (kind,), names(), key)
