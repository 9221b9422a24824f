"""Where documents come from: `open_corpus` finds the files, `Corpus.documents` yields (id, bytes) in a fixed order.

Every source is a list of files below one root, and a document's id is its path below that root (plus `#row` in a
table), so the ids, the order and therefore the split do not depend on where the root is. A folder that holds tables is
read as tables only; otherwise each file is one document.
"""

from __future__ import annotations

import itertools
import logging
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from aurora_train.errors import UserError
from aurora_train.sources import find, readers
from aurora_train.sources.readers import LeftOut
from language import listing, tables
from language.settings import TextDataConfig, check_settings, resolve

log = logging.getLogger("aurora_train")

_ALWAYS_READ = (".jsonl", ".parquet", ".arrow")  # as tables, by every version
_ENOUGH = 1000  # files of a folder that `check_data` checks


@dataclass(frozen=True)
class Corpus:
    """The files of a source, listed but not yet read.

    `files` are (id, path) pairs sorted by id; a hub source has none and reads through `datasets`. `key` is the section
    of the config that names the source.
    """

    name: str
    licence: str
    text_field: str
    files: list[tuple[str, Path]] = field(default_factory=list)
    tables: bool = False
    hub: str | None = None
    key: str = "data"

    def documents(self) -> Iterator[tuple[str, bytes | LeftOut]]:
        """(id, raw bytes or the reason why there are none) of every document; a null text is empty bytes.

        Raises UserError for a file that cannot be read, and for a table without any text in the text field.
        """
        if self.hub:
            cells = (cell for batch in self.batches() for cell in readers.arrow_cells(batch, self.text_field))
            yield from tables.numbered(self.hub, cells, self.hub, self.text_field, self.key)
        for name, path in self.files:
            if self.tables:
                yield from tables.documents(name, path, self.text_field, self.key)
            else:
                yield name, _read(path)

    def batches(self) -> Iterator:
        """The pyarrow Tables of a hub source, in order."""
        return _hub_dataset(self.hub).with_format("arrow").iter(batch_size=1024)

    def newly_read(self) -> list[str]:
        """Suffixes of files that earlier versions read as plain text, so that their stores hold other documents."""
        names = (name for name, _ in self.files if tables.is_compressed(name) or self.tables)
        return sorted({os.path.splitext(name)[1] for name in names}.difference(_ALWAYS_READ))

    def listing(self, cache: Path, progress: Callable) -> list[tuple[str, int, str]]:
        """As `listing.listed`: the identity of the source."""
        if self.hub:
            return [(self.hub, 0, str(_hub_dataset(self.hub)._fingerprint))]
        return listing.listed(self.files, cache, progress)


@dataclass(frozen=True)
class Mixture:
    """Several sources as one: a document's id begins with its source's name, and each source comes whole."""

    parts: dict[str, Corpus]
    limits: dict[str, int | None]
    hub = None
    tables = True  # true for callers' purposes: the number of documents is unknown before they are read

    name = property(lambda self: " + ".join(f"{name} ({part.name})" for name, part in self.parts.items()))
    licence = property(lambda self: "; ".join(f"{name}: {part.licence}" for name, part in self.parts.items()))

    def documents(self) -> Iterator[tuple[str, bytes | LeftOut]]:
        """As in Corpus, one source after the other."""
        for name, part in self.parts.items():
            for document, data in itertools.islice(part.documents(), self.limits[name]):
                yield f"{name}/{document}", data

    def listing(self, cache: Path, progress: Callable) -> list[tuple[str, int, str]]:
        """As in Corpus."""
        return [
            (f"{name}/{document}", size, digest)
            for name, part in self.parts.items()
            for document, size, digest in part.listing(cache, progress)
        ]

    def newly_read(self) -> list[str]:
        """As in Corpus."""
        return [f"{name}/{suffix}" for name, part in self.parts.items() for suffix in part.newly_read()]


def open_corpus(config: TextDataConfig, base: Path | None = None) -> Corpus | Mixture:
    """List the files that the config names; relative paths start at `base`, the config file's folder.

    Raises UserError for a missing path, a hub source without `online`, and a source without files.
    """
    check_settings(config, base)
    opened, remarks = {}, []
    for name, one in _parts(config).items():
        opened[name] = _open_one(one, _key(name), base, remarks)
    for remark in remarks:
        log.warning("%s", remark)
    limits = {name: part.max_documents for name, part in config.mix.items()}
    return Mixture(opened, limits) if config.mix else opened[""]


def check_data(config: TextDataConfig, base: Path | None = None) -> None:
    """Raise UserError for mistakes that show without reading the whole source; reads the first rows of tables."""
    check_settings(config, base)
    if config.tokenizer.kind == "file":
        from language.tokenizers import open_file

        open_file(config.tokenizer, base)
    for name, one in _parts(config).items():
        corpus = _open_one(one, _key(name), base, [], _ENOUGH)
        filled = next((path for _, path in corpus.files if path.stat().st_size), None)
        if corpus.tables and filled and len(corpus.files) < _ENOUGH:
            tables.peek(filled, corpus.text_field, corpus.key)


def _key(part: str) -> str:
    return f"data.mix.{part}" if part else "data"


def _parts(config: TextDataConfig) -> dict[str, TextDataConfig]:
    """A separate config for each source of a mixture, sorted by name; for a single source, the config itself as ""."""
    if not config.mix:
        return {"": config}
    return {
        name: config.model_copy(update={
            "source": part.source, "pattern": part.pattern, "text_field": part.text_field, "mix": {},
        })
        for name, part in sorted(config.mix.items())  # the order in the config has no meaning
    }  # fmt: skip


def _open_one(
    config: TextDataConfig, key: str, base: Path | None, remarks: list[str], limit: int | None = None
) -> Corpus:
    if config.source == "python-stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = find.below(root, "**/*.py", skip=("site-packages", "dist-packages", "__pycache__"))
        return Corpus(f"python-stdlib {platform.python_version()}", "PSF-2.0", config.text_field, files)
    if config.source.startswith("hub:"):
        return of_hub(config.source, key, config.online, config.text_field)
    root, files = located(config.source, config.pattern, key, base, remarks, limit)
    chosen, is_table = _chosen(config, key, files, remarks)
    return Corpus(config.source, licence(root), config.text_field, chosen, is_table, key=key)


def located(
    source: str, pattern: str, key: str, base: Path | None, remarks: list[str], limit: int | None = None
) -> tuple[Path, list[tuple[str, Path]]]:
    """(root, (name, path) of every file) of a source on disk, as in `find`; UserError if there is none.

    `key` is the section of the config that names the source; `remarks` receives a line on what cannot be read.
    """
    path, lost = resolve(source, base), []
    if not path.exists() and not any(character in source for character in "*?["):
        raise UserError(
            f"there is no file or folder {source}",
            where=f"{key}.source",
            why=f"looked for {path}",
            hint=f"{key}.source=PATH names its new place, if it moved; a path is relative to the config file's folder",
        )
    root, files = find.find(path, pattern, lost, limit)
    if not files:
        raise UserError(
            f"{source} holds no files",
            where=f"{key}.source",
            why=f"looked for {pattern} in {root}" if path.is_dir() else f"looked for {path}",
            hint="hidden files are left out; data.pattern is a glob such as '**/*.txt'",
        )
    if lost:
        remarks.append(f"{source}: {listed(lost)} cannot be read: a broken link, or no permission")
    return root, files


def of_hub(source: str, key: str, online: bool, text_field: str) -> Corpus:
    """The corpus of a `hub:` source. UserError without `online`."""
    if not online:
        raise UserError(
            f"{source} is on the network, and the network is off",
            where=f"{key}.source",
            hint=f"add data.online=true (--online), or download the files and name their folder as {key}.source",
        )
    return Corpus(source, "see the dataset's page", text_field, hub=source[4:], key=key)


def _chosen(config: TextDataConfig, key: str, files: list, remarks: list[str]) -> tuple[list, bool]:
    """(the files to be read, whether they are tables); `remarks` receives lines on the other files."""
    if all(tables.suffix(name) in tables.UNREADABLE for name, _ in files):
        raise UserError(
            f"{files[0][0]} is of an unsupported kind",
            where=f"{key}.source",
            why=f"supported: plain text, {' '.join(tables.KINDS)}, also compressed: {' '.join(tables.COMPRESSED)}",
            hint="unpack it" if tables.suffix(files[0][0]) in tables.ARCHIVES else "convert it to one of these",
        )
    packed = [name for name, _ in files if tables.suffix(name) in tables.ARCHIVES]
    if packed:
        remarks.append(f"{config.source}: archives are not read: {listed(packed)}")
        files = [(name, path) for name, path in files if tables.suffix(name) not in tables.ARCHIVES]
    verdicts = {name: tables.is_table(name, path, config.text_field) for name, path in files}
    if all(tables.kind(name) for name in verdicts) and not any(verdicts.values()):
        return files, True  # the reader reports what is there instead of the column
    if any(verdicts.values()):
        held = [(name, path) for name, path in files if verdicts[name] is not False]
        others = [name for name in verdicts if verdicts[name] is False]
        if others:
            remarks.append(
                f"{config.source} holds tables: {len(others)} other files are not read "
                f"(data.pattern chooses): {listed(others)}"
            )
        return held, True
    as_text = [name for name, _ in files if tables.kind(name) and verdicts[name] is False]
    if as_text:
        remarks.append(
            f"{config.source}: {len(as_text)} files without a field `{config.text_field}` are read as plain text, "
            f"like those beside them: {listed(as_text)}"
        )
    return files, False


def listed(names: list[str]) -> str:
    """The first three of them, for a remark."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def licence(root: Path) -> str:
    """The name of a licence file at the root of a user's folder, which is recorded and not interpreted."""
    names = sorted(path.name for path in root.iterdir() if path.stem.upper() in ("LICENSE", "LICENCE", "COPYING"))
    return f"see {names[0]}" if names else "not stated"


def _read(path: Path) -> bytes | LeftOut:
    try:
        return tables.read_text(path)
    except OSError as error:
        raise listing.unreadable(path, error) from error


def _hub_dataset(name: str):
    datasets = _import_datasets()
    try:
        return datasets.load_dataset(name, split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise UserError(f"cannot load hub:{name}", where="data.source", why=str(error).split("\n")[0]) from error


def _import_datasets():
    """The package `datasets`, with the network allowed and without telemetry."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "0"
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs errors that it then raises, and we report them once
    return datasets
