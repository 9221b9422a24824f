"""Facts: small items besides the config that are needed to build and use a model.

A tokenizer, the number of channels, the scale of a signal: what a recipe derived from its data and cannot work without.
A run keeps them once in its own folder, and every checkpoint names their hash. So a run can be read, scored on other
data and sampled on a machine that never had its training data.

A fact is bytes, kept as a file under the fact's name (`tokenizer.json`), or plain JSON, kept in `facts.json`.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from aurora_train.errors import UserError
from aurora_train.files import write_atomically

Facts = dict[str, Any]

# When a run that has a chat template began: the date that the template is given. It makes no model another one.
DATE = "template_date"
_VALUES = "facts.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")


def as_kept(facts: Facts, where: str) -> Facts:
    """The facts in the form that a reader of the run will get: arrays and tuples become lists.

    Raises UserError, placed at `where`, for a name that cannot be a file name and for a value that cannot be a fact.
    """
    kept = {}
    for name, value in facts.items():
        if not isinstance(name, str) or not _NAME.match(name) or name == _VALUES:
            raise UserError(f"{name!r} cannot name a fact", where=where, hint="letters, digits, `.`, `-` and `_`")
        if isinstance(value, bytes):
            kept[name] = value
            continue
        try:
            kept[name] = json.loads(json.dumps(value, allow_nan=False, default=_plain))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the fact `{name}` cannot be kept: {error}", where=where,
                hint="a fact is bytes, an array, or plain JSON: numbers, text, lists and dicts of them",
            ) from None
    return kept


def _plain(value):
    if hasattr(value, "tolist"):  # numpy arrays and scalars, exactly: a float is written so that it reads back equal
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def sha256(facts: Facts) -> str:
    """sha256 hex over the names and the values of facts `as_kept`."""
    hasher = hashlib.sha256()
    for name, value in sorted(facts.items()):
        content = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
        hasher.update(json.dumps([name, isinstance(value, bytes), len(content)]).encode() + content)
    return hasher.hexdigest()


def write(folder: Path, facts: Facts) -> None:
    """Store the facts in `folder`. The file that lists them is written last: a folder without it has no facts."""
    for name, value in facts.items():
        if isinstance(value, bytes):
            write_atomically(folder / name, value)
    listed = {name: {"file": hashlib.sha256(value).hexdigest()} if isinstance(value, bytes) else {"value": value}
              for name, value in facts.items()}  # fmt: skip
    write_atomically(folder / _VALUES, json.dumps(listed, indent=1) + "\n")


def read(folder: Path) -> Facts | None:
    """The facts stored in `folder`; None if there are none. UserError if a file is missing or was changed."""
    try:
        listed = json.loads((folder / _VALUES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(folder / _VALUES, "is not the file that was written") from error
    return {name: _read_file(folder / name, entry["file"]) if "file" in entry else entry["value"]
            for name, entry in listed.items()}  # fmt: skip


def _read_file(path: Path, digest: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise _damaged(path, "was changed")
    return content


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"a fact of this run {what}", where=str(path), why="a model needs the facts that it was trained with",
        hint="restore the `facts` folder of this run from a copy",
    )  # fmt: skip


def difference(ours: Facts, theirs: Facts) -> list[str]:
    """The names of facts that both have with different values, the date of a template left out."""
    return [name for name in ours if name in theirs and name != DATE and ours[name] != theirs[name]]


def shown(value) -> str:
    """A fact for use in a message: a short value as it is, a long one by its hash."""
    if not isinstance(value, bytes):
        text = json.dumps(value)
        if len(text) <= 40:
            return text
        value = text.encode()
    return f"sha256 {hashlib.sha256(value).hexdigest()[:12]}"
