"""The files of a source of conversations: tables in a folder, also as Hugging Face's `datasets` writes folders.

A folder that `save_to_disk` wrote is read as its `state.json` says, without the caches beside the data. Of a folder
with files for several splits the training split is read, unless `pattern` chooses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from aurora_train.errors import UserError
from aurora_train.sources import readers
from language import tables, tasks
from language.corpus import Corpus, licence, listed, located, of_hub
from language.settings import resolve
from language.settings_tune import MixedConversationsConfig

_STATE = "state.json"
_METADATA = (_STATE, "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_SPLITS = re.compile(r"(?<![a-z])(train|training|test|testing|eval|evaluation|valid|validation|val|dev)(?![a-z])")


def opened(
    part: MixedConversationsConfig, name: str, online: bool, base: Path | None, say: Callable[[str], None]
) -> Corpus:
    """The tables of a source. `part`: its section of the config; `name`: that in a mixture, which begins the names of
    its files. Raises UserError if it is not there, or holds no table, or a file of it is missing."""
    key = f"data.mix.{name}" if name else "data"
    if part.source.startswith("hub:"):
        return of_hub(part.source, key, online, "")
    if part.source.startswith(tasks.PREFIX):
        path = tasks.table(part.source.removeprefix(tasks.PREFIX), f"{key}.source")
        return Corpus(part.source, "CC0-1.0", "", _named(name, [(path.name, path)]), tables=True, key=key)
    remarks = []
    root, found = located(part.source, part.pattern, key, base, remarks)
    files = [(one, path) for one, path in found if tables.kind(one) and path.name not in _METADATA]
    if not files:
        raise UserError(
            f"{part.source} holds no table", where=f"{key}.source", why=f"it holds {listed([one for one, _ in found])}",
            hint=f"supported are {' '.join(tables.KINDS)}, also compressed: {' '.join(tables.COMPRESSED)}",
        )  # fmt: skip
    others = [one for one, path in found if not tables.kind(one) and path.suffix not in (".md", ".yaml")]
    if others:
        remarks.append(f"{part.source}: {len(others)} files that are no tables are not read: {listed(others)}")
    files = _saved(files, key)
    if part.pattern == type(part).model_fields["pattern"].default and resolve(part.source, base).is_dir():
        files = _training(files, part.source, remarks)
    for remark in remarks:
        say(remark)
    return Corpus(part.source, licence(root), "", _named(name, files), tables=True, key=key)


def _named(name: str, files: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The files of a mixture's source, whose names begin with its own: a row's place is that of no other row."""
    return [(f"{name}/{one}" if name else one, path) for one, path in files]


def objects(source: Corpus, fields: tuple[str, ...]) -> Iterator[tuple[str, object, Callable[[], list[str]]]]:
    """(place, row as in `readers.objects`, a function for the names of all columns) of every row."""
    if source.hub:
        rows = ((row, batch.schema.names) for batch in source.batches() for row in readers.arrow_objects(batch, fields))
        name = f"{source.key.removeprefix('data.mix.')}/{source.name}" if source.key != "data" else source.name
        for number, (row, names) in enumerate(rows, 1):
            yield tables.place(name, None, number), row, partial(list, names)
    for name, path in source.files:
        for number, (line, row) in enumerate(tables.rows(path, fields, source.key, readers.objects), 1):
            yield tables.place(name, line, number), row, partial(_names, path, row)


def _names(path: Path, row: object) -> list[str]:
    return readers.columns(path, tables.kind(path.name)) or list(row if isinstance(row, dict) else ())


def _saved(files: list[tuple[str, Path]], key: str) -> list[tuple[str, Path]]:
    """The files without those that a `state.json` beside them does not name. UserError if one that it names is not
    there."""
    kept = dict(files)
    for folder in sorted({path.parent for _, path in files if (path.parent / _STATE).is_file()}):
        try:
            state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            named = {one["filename"] for one in state["_data_files"]}
        except (KeyError, TypeError):
            continue  # another program's file of this name
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {folder / _STATE}", where=f"{key}.source", why=str(error)) from error
        missing = sorted(name for name in named if not (folder / name).is_file())
        if missing:
            raise UserError(f"{folder} lacks {missing[0]}", where=f"{key}.source", why=f"its {_STATE} names this file",
                            hint="copy the whole folder again")  # fmt: skip
        kept = {name: path for name, path in kept.items() if path.parent != folder or path.name in named}
    return list(kept.items())


def _training(files: list[tuple[str, Path]], source: str, remarks: list[str]) -> list[tuple[str, Path]]:
    """The files without those of other splits, if some are of the training split."""
    splits = {name: (_SPLITS.findall(name.lower()) or ["train"])[-1].startswith("train") for name, _ in files}
    named = any(is_train and _SPLITS.search(name.lower()) for name, is_train in splits.items())
    others = [name for name, is_train in splits.items() if not is_train]
    if not named or not others:
        return files
    remarks.append(f"{source}: only the training split is read (data.pattern chooses), not {listed(others)}")
    return [(name, path) for name, path in files if splits[name]]
