"""Where documents come from: `open_corpus` finds the files, `Corpus.documents` yields (id, bytes) in a fixed order.

Every source is a list of files below one root, and a document's id is its path below that root (`#row` is added in
a table), so the ids, the order and therefore the split do not depend on where the root lies. A folder that holds
tables (.jsonl, .parquet, .arrow) is read as tables only; otherwise each file is one document.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from aurora_train.data.config import TextDataConfig, check_data, resolve
from aurora_train.errors import UserError

log = logging.getLogger("aurora_train")

TABLES = {".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
_ROWS_PER_BATCH = 1024
_RACY_NS = 2_000_000_000  # a file changed this shortly before it was hashed may have changed again unseen


@dataclass(frozen=True)
class Corpus:
    """The files of a source, found but not yet read.

    `files` are (id, path) pairs sorted by id; a hub source has none and reads through `datasets`.
    """

    name: str
    licence: str
    text_field: str
    files: list[tuple[str, Path]] = field(default_factory=list)
    tables: bool = False
    hub: str | None = None

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """(id, raw bytes) of every document; a null text is empty bytes.

        Raises UserError for a file that cannot be read, and for a table without the text field.
        """
        if self.hub:
            yield from _rows(_hub_dataset(self.hub), self.hub, self.hub, self.text_field)
        for name, path in self.files:
            if self.tables:
                yield from _table(name, path, self.text_field)
            else:
                yield name, _read(path)

    def listing(self, cache: Path, progress: Callable) -> list[tuple[str, int, str]]:
        """(id, bytes, sha256) of every file: what the source is, wherever it lies.

        Hashes are remembered in `cache` under (path, size, mtime, ctime, inode); a file that was touched within two
        seconds of being hashed is hashed again, since its clock may not show a second change.
        """
        if self.hub:
            return [(self.hub, 0, str(_hub_dataset(self.hub)._fingerprint))]
        first = hashlib.sha256(os.fsencode(self.files[0][1])).hexdigest()[:16]
        memory = cache / f"hashes-{first}.json"
        known = _load_hashes(memory)
        hashed, found, changed = {}, [], False
        for done, (name, path) in enumerate(self.files):
            try:
                status = path.stat()
            except OSError as error:
                raise _unreadable(path, error) from error
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            entry = known.get(str(path))
            if not entry or entry[:4] != stamp:
                changed, settled = True, time.time_ns() - _RACY_NS > max(stamp[1:3])
                entry = [*(stamp if settled else [-1] * 4), _hash_file(path)]
                progress(done, len(self.files), "hashing the source")
            hashed[str(path)] = entry
            found.append((name, status.st_size, entry[4]))
        if changed:
            _write_atomically(memory, json.dumps(hashed))
        return found


@dataclass(frozen=True)
class Mixture:
    """Several sources as one: a document's id begins with its source's name, and each source comes whole."""

    parts: dict[str, Corpus]
    limits: dict[str, int | None]
    hub = None
    tables = True  # as far as anybody asks: how many documents there are is not known before they are read

    name = property(lambda self: " + ".join(f"{name} ({part.name})" for name, part in self.parts.items()))
    licence = property(lambda self: "; ".join(f"{name}: {part.licence}" for name, part in self.parts.items()))

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """As Corpus has it, one source after the other."""
        for name, part in self.parts.items():
            for document, data in itertools.islice(part.documents(), self.limits[name]):
                yield f"{name}/{document}", data

    def listing(self, cache: Path, progress: Callable) -> list[tuple[str, int, str]]:
        """As Corpus has it."""
        return [
            (f"{name}/{document}", size, digest)
            for name, part in self.parts.items()
            for document, size, digest in part.listing(cache, progress)
        ]


def open_corpus(config: TextDataConfig, base: Path | None = None) -> Corpus | Mixture:
    """Find the files that the config names; relative paths start at `base`, the config file's folder.

    Raises UserError for a missing path, a hub source without `online`, and a source without files.
    """
    check_data(config, base)
    if not config.mix:
        return _open_one(config, base)
    alone = {
        name: config.model_copy(update={
            "source": part.source, "pattern": part.pattern, "text_field": part.text_field, "mix": {},
        })
        for name, part in sorted(config.mix.items())  # the order in which they are written says nothing
    }  # fmt: skip
    limits = {name: part.max_documents for name, part in config.mix.items()}
    return Mixture({name: _open_one(one, base) for name, one in alone.items()}, limits)


def _open_one(config: TextDataConfig, base: Path | None) -> Corpus:
    if config.source == "python-stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = _below(root, "**/*.py", skip=("site-packages", "dist-packages", "__pycache__"))
        return Corpus(f"python-stdlib {platform.python_version()}", "PSF-2.0", config.text_field, files)
    if config.source.startswith("hub:"):
        return Corpus(config.source, "see the dataset's page", config.text_field, hub=config.source[4:])

    path = resolve(config.source, base)
    if path.is_dir():
        root, files = path, _below(path, config.pattern, skip=("__pycache__",))
    elif path.is_file():
        root, files = path.parent, [(path.name, path)]
    else:
        matches = [Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match)]
        root = Path(os.path.commonpath([match.parent for match in matches])) if matches else path.parent
        files = sorted((match.relative_to(root).as_posix(), match) for match in matches)
    tables = [(name, file) for name, file in files if file.suffix in TABLES]
    if tables and len(tables) < len(files):
        log.warning(
            "%s holds tables: %d other files are not read (data.pattern chooses)",
            config.source, len(files) - len(tables),
        )
    if not files:
        raise UserError(
            f"{config.source} holds no files",
            where="data.source",
            why=f"looked for {config.pattern} in {root}" if path.is_dir() else f"looked for {path}",
            hint="hidden files are left out; data.pattern is a glob such as '**/*.txt'",
        )
    return Corpus(config.source, _licence(root), config.text_field, tables or files, bool(tables))


def _below(root: Path, pattern: str, skip: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Files below `root` that match, sorted by their path in it, without hidden ones and folders named in `skip`."""
    matches, found = _matcher(pattern), []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        found += [prefix + name for name in names if not name.startswith(".") and matches(prefix + name)]
    return [(name, path) for name in sorted(found) if os.path.isfile(path := root / name)]


def _matcher(pattern: str) -> Callable[[str], bool]:
    """A glob over relative posix paths, where `**/` is any number of folders, also none."""
    expression, position = "", 0
    while position < len(pattern):
        if pattern.startswith("**/", position):
            expression, position = expression + "(?:.*/)?", position + 3
        elif pattern.startswith("**", position):
            expression, position = expression + ".*", position + 2
        else:
            character = pattern[position]
            expression += {"*": "[^/]*", "?": "[^/]"}.get(character, re.escape(character))
            position += 1
    compiled = re.compile(expression + r"\Z", re.DOTALL)
    return lambda name: compiled.match(name) is not None


def _licence(root: Path) -> str:
    """The name of a licence file at the root of a user's folder: we record it, we do not judge it."""
    names = sorted(path.name for path in root.iterdir() if path.stem.upper() in ("LICENSE", "LICENCE", "COPYING"))
    return f"see {names[0]}" if names else "not stated"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path, error) -> UserError:
    return UserError(f"cannot read {path}", where="data.source", why=str(error))


def _table(name: str, path: Path, text_field: str) -> Iterator[tuple[str, bytes]]:
    datasets = import_datasets(online=False)
    import pyarrow

    try:
        table = datasets.load_dataset(
            TABLES[path.suffix], data_files=str(path), split="train", streaming=True
        )
        yield from _rows(table, name, str(path), text_field)
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path} as {path.suffix[1:]}",
            where="data.source",
            why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no more is known'}",
            hint="the file may be cut short or be of another kind; data.pattern can leave it out",
        ) from error


def _rows(table, name: str, where: str, text_field: str) -> Iterator[tuple[str, bytes]]:
    """Arrow batch by Arrow batch: row by row `datasets` is five times slower (22 against 4.6 Mtok/s)."""
    row = 0
    for batch in table.with_format("arrow").iter(batch_size=_ROWS_PER_BATCH):
        if text_field not in batch.column_names:
            raise UserError(
                f"{where} has no field `{text_field}`",
                where="data.text_field",
                why=f"its fields are {', '.join(batch.column_names)}",
            )
        for text in batch.column(text_field).to_pylist():
            if not isinstance(text, (str, bytes, type(None))):
                raise UserError(
                    f"field `{text_field}` of {where} holds {type(text).__name__}, not text",
                    where="data.text_field",
                    why=f"its fields are {', '.join(batch.column_names)}",
                )
            yield f"{name}#{row}", text.encode() if isinstance(text, str) else text or b""
            row += 1


def _hub_dataset(name: str):
    datasets = import_datasets(online=True)
    try:
        return datasets.load_dataset(name, split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise UserError(f"cannot load hub:{name}", where="data.source", why=str(error).split("\n")[0]) from error


def import_datasets(online: bool):
    """`datasets`, which looks up a host even for a local file unless told not to before it is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "0" if online else "1"
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs what it then raises, and we say that once
    return datasets


def _load_hashes(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}  # only a cache: everything is hashed again


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")  # several processes may do this at once
    temporary.write_text(text)
    temporary.replace(path)
