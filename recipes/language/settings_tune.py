"""The `data` section of a recipe that learns from conversations. Free of numpy and jax: `aurora check` imports it."""

from __future__ import annotations

from typing import Literal

from aurora_train.config import Section, setting
from aurora_train.errors import UserError, nearest
from language.row_formats import FIELDS
from language.settings import check_mix, check_shares

Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt", "text"]

_SOURCE = (
    "a table (jsonl, json, csv, parquet, Arrow, also compressed), a folder or glob of tables, hub:owner/name, or a "
    "bundled task: task:calendar, for preferences task:calendar-pairs and task:calendar-judged"
)
_FORMAT = (
    "messages (a list of role and content), sharegpt (conversations of from and value), alpaca (instruction, input, "
    "output), prompt (prompt and completion: texts or messages), text (raw, all of it learned), or auto: as the fields "
    "of the first rows say"
)
_FIELDS = "other names of columns, by the usual one: {messages: dialogue} reads the column `dialogue`"


class MixedConversationsConfig(Section):
    """One of several sources of a mixture. Its name begins the names of its files."""

    source: str = setting(resume="located", path_unless=("hub:", "task:"), help=_SOURCE)
    weight: float = setting(1.0, gt=0, help="its share of the training rows, relative to the others' weights")
    pattern: str = setting("**/*", help="glob inside a folder")
    format: Format = setting("auto", help=_FORMAT)
    fields: dict[str, str] = setting({}, help=_FIELDS)
    max_rows: int | None = setting(None, ge=1, help="read only the first rows of the source, in its order")


class ConversationDataConfig(Section):
    """Where the conversations come from, how they are read and split, and how long a packed row is."""

    source: str | None = setting(None, resume="located", path_unless=("hub:", "task:"), help=_SOURCE)
    mix: dict[str, MixedConversationsConfig] = setting(
        {}, help="several named sources, {source, weight} each, instead of one"
    )
    pattern: str = setting("**/*", help="glob inside a folder")
    format: Format = setting("auto", help=_FORMAT)
    fields: dict[str, str] = setting({}, help=_FIELDS)
    max_rows: int | None = setting(None, ge=1, help="read only the first rows of the source, in its order")
    damaged: Literal["refuse", "leave_out"] = setting(
        "refuse", help="rows that cannot be read, are no conversation, or are refused by the template: refuse them, or "
        "leave them out and count them"
    )
    sequence: int = setting(1024, ge=2, help="tokens per packed row")
    overlong: Literal["refuse", "leave_out", "cut"] = setting(
        "refuse", help="conversations longer than a row: refuse them, leave them out and count them, or cut their end"
    )
    holdout_test: float = setting(
        0.02, ge=0, lt=1, help="share of conversations kept for the score, by hash of content"
    )
    holdout_validation: float = setting(
        0.01, ge=0, lt=1, help="share of conversations kept for evaluation while training"
    )
    online: bool = setting(False, resume="free", help="allow a hub: source to use the network")


def check_conversations(data: ConversationDataConfig) -> None:
    """Raise UserError for settings that are wrong for any source."""
    check_shares(data)
    if data.mix:
        check_mix(data, "source", "pattern", "format", "fields", "max_rows")
    elif data.source is None:
        raise UserError("no data are named", where="data.source", hint="data.source=chats.jsonl")
    for section, part in [("data", data), *((f"data.mix.{name}", part) for name, part in data.mix.items())]:
        for field in part.fields:
            if field not in FIELDS:
                raise UserError(f"`{field}` is not a field of a row", where=f"{section}.fields",
                                why=f"the fields are {', '.join(FIELDS)}", hint=nearest(field, FIELDS))  # fmt: skip
