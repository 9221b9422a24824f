"""An open model on a hub, `hub:owner/name` or `hub:owner/name@REVISION`: downloaded once, then read from the cache.

Only a command that may use the network (`--online`) asks the hub; every other one reads the copy in the cache folder.
There the files lie as the library huggingface_hub lays them, `models--owner--name/snapshots/COMMIT`, but a folder gets
the name of its commit only when all of its files are whole: their sizes and hashes are those that the hub states. The
library's own download of a file begins anew in another process (2.4.0); ours continues where it broke off.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from aurora_train import files
from aurora_train.errors import UserError

log = logging.getLogger("aurora_train")

HUB = "hub:"  # how a model on a hub is named
_PART_OF_A_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_REPOSITORY = re.compile(rf"(?!.*(?:--|\.\.)){_PART_OF_A_NAME}/{_PART_OF_A_NAME}", re.ASCII)  # so hubs name them
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]{0,79}", re.ASCII)  # short enough for the name of a file when quoted
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE = re.compile(r"[\w.-]+", re.ASCII)
_KEPT = ("*.safetensors", "*.json", "*.jinja", "README.md")
_AGAIN = ("consolidated*.safetensors",)  # the same weights once more, by other names
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SNAPSHOTS, _REFS, _PART = "snapshots", "refs", ".part"


class Model(NamedTuple):
    """What a name means: `repository` is owner/name, `revision` a branch, a tag or a commit."""

    repository: str
    revision: str = "main"

    @classmethod
    def named(cls, text: str, where: str | None) -> Model:
        """The model of `hub:owner/name[@REVISION]`. UserError for any other text."""
        repository, at, revision = text.removeprefix(HUB).partition("@")
        revision = revision if at else "main"
        if not _REPOSITORY.fullmatch(repository) or not _REVISION.fullmatch(revision):
            raise UserError(f"{text} names no model on a hub", where=where, hint="write hub:owner/name, and "
                            "hub:owner/name@REVISION for a branch, a tag or a commit")  # fmt: skip
        return cls(repository, revision)

    def __str__(self) -> str:
        return HUB + self.repository + ("" if self.revision == "main" else f"@{self.revision}")

    @property
    def folder(self) -> Path:
        """Where the cache holds its commits."""
        return files.cache_folder() / "hub" / f"models--{self.repository.replace('/', '--')}"

    def snapshot(self, commit: str) -> Path:
        return self.folder / _SNAPSHOTS / commit

    def copy(self) -> Path | None:
        """The folder in the cache that holds the revision as it was last downloaded, or None."""
        ref = self.folder / _REFS / quote(self.revision, safe="")
        commit = ref.read_text().strip() if ref.is_file() else self.revision
        found = self.snapshot(commit) if _COMMIT.fullmatch(commit) else None
        return found if found and found.is_dir() else None


class _File(NamedTuple):
    """A file that the hub offers: its bytes, and the hash that it states (`kind` "sha256" or git's "sha1")."""

    name: str
    num_bytes: int
    kind: str
    digest: str | None


def copied(named: str, *, online: bool, where: str | None = None) -> Path:
    """The folder of a model on a hub: the copy in the cache, which is brought up to date first if `online`.

    `where`: the key or argument that names it. Raises UserError for a name that is none, for a model that is not in the
    cache while the network is off, for a hub that cannot be reached or has no such model, and for a model that is not
    stored as safetensors.
    """
    model = Model.named(named, where)
    if online:
        folder = _downloaded(model, where)
        bring_bases(folder)
        return folder
    folder = model.copy()
    if folder is None:
        begun = any((model.folder / _SNAPSHOTS).glob(f"*{_PART}"))
        raise UserError(
            f"{model} is on the network, and the network is off", where=where,
            why="a download of it was broken off; the next one continues it" if begun else None,
            hint="`aurora import` and `aurora train` download it once with --online (data.online=true in a config); or "
            "name the folder of a copy",
        )  # fmt: skip
    return folder


def bring_bases(folder: Path) -> None:
    """Download the base of an adapter, which may be an adapter too, if it is named on a hub and not in the cache."""
    seen = {folder}
    while (base := base_of(folder)) is not None:
        folder = base.copy() or _downloaded(base, str(folder / "adapter_config.json"))
        if folder in seen:
            break  # they name each other, which the reader of adapters refuses
        seen.add(folder)


def origin(path: str | Path) -> dict[str, str]:
    """{"hub": "owner/name", "revision": the commit} of a folder that a hub's cache holds; {} for any other path."""
    path = Path(path)
    at = path.parent.parent.name
    if path.parent.name != _SNAPSHOTS or not at.startswith("models--") or not _COMMIT.fullmatch(path.name):
        return {}
    return {"hub": at.removeprefix("models--").replace("--", "/", 1), "revision": path.name}


def public_name(path: str | Path) -> str:
    """The name under which others know a source: owner/name of a hub, else the name of its folder or file."""
    return origin(path).get("hub") or Path(path).resolve().name


def base_of(folder: Path) -> Model | None:
    """The base of an adapter, if it has the name of a model on a hub and not that of a folder here.

    UserError if the `revision` beside it is none: another one would be another base.
    """
    config = files.read_json(folder / "adapter_config.json", {})
    base, revision = map((config if isinstance(config, dict) else {}).get, ("base_model_name_or_path", "revision"))
    if not isinstance(base, str) or not _REPOSITORY.fullmatch(base) or Path(base).exists() or (folder / base).exists():
        return None
    if revision is not None and not (isinstance(revision, str) and _REVISION.fullmatch(revision)):
        raise UserError(
            f"`revision` is {json.dumps(revision)[:60]}, which names none of {base}",
            where=str(folder / "adapter_config.json"), hint="write a branch, a tag, a commit or null",
        )  # fmt: skip
    return Model(base, revision or "main")


def _downloaded(model: Model, where: str | None) -> Path:
    """The folder of what a revision is now, downloaded unless it is here already."""
    with _library() as hub, _explained(model, where):
        endpoint = os.environ.get("HF_ENDPOINT") or None
        found = hub.HfApi(endpoint).model_info(model.repository, revision=model.revision, files_metadata=True)
        commit = str(found.sha)
        if not _COMMIT.fullmatch(commit):
            raise UserError(f"the hub names the commit {commit!r} of {model}, which is none", where=where)
        folder = model.snapshot(commit)
        files.make_folder(folder.parent)
        with (model.folder / ".lock").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # another process may be downloading it
            if not folder.is_dir():
                wanted = _wanted(found.siblings or [], model, where)
                _fill(hub, endpoint, model, commit, wanted, folder.with_name(commit + _PART), where)
                folder.with_name(commit + _PART).rename(folder)
                files.sync(folder.parent)
            if model.revision != commit:
                files.write_atomically(model.folder / _REFS / quote(model.revision, safe=""), commit)
    return folder


def _wanted(siblings: list[Any], model: Model, where: str | None) -> list[_File]:
    """The files of a model that are read. UserError, before any of them is downloaded, if its weights are not among
    them."""
    names = [one.rfilename for one in siblings]
    kept = [one for one in siblings if _FILE.fullmatch(one.rfilename)  # a name with a slash lies in a folder
            and any(fnmatch.fnmatch(one.rfilename, pattern) for pattern in _KEPT)
            and not any(fnmatch.fnmatch(one.rfilename, pattern) for pattern in _AGAIN)]  # fmt: skip
    if not any(one.rfilename.endswith(".safetensors") for one in kept):
        pickle = next((name for name in names if name.endswith(_PICKLES)), None)
        gguf = next((name for name in names if name.endswith(".gguf")), None)
        what = f"its weights are {pickle}, a pickle, which may run any code when read" if pickle else (
            "there is no *.safetensors in it")  # fmt: skip
        hint = f"download {gguf}, and name the file" if gguf else "name a revision or a model with safetensors"
        raise UserError(f"{model} cannot be read: {what}", where=where, hint=hint)
    found = []
    for one in kept:
        if not isinstance(one.size, int):
            raise UserError(f"the hub states no size of {one.rfilename}", where=where)
        kind, digest = ("sha256", one.lfs.sha256) if one.lfs else ("sha1", one.blob_id)
        found.append(_File(one.rfilename, one.size, kind, digest))
    return found


def _fill(
    hub, endpoint: str | None, model: Model, commit: str, wanted: list[_File], folder: Path, where: str | None
) -> None:
    """Download into a folder what it lacks of the wanted files, each from where an earlier download broke off."""
    files.make_folder(folder)
    here = {path.name: path.stat().st_size for path in folder.iterdir()}
    missing = sum(one.num_bytes - here.get(one.name, here.get(one.name + _PART, 0)) for one in wanted)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(
            f"{model} takes {missing / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free", where=str(folder),
            hint="make room, or name a larger disk as AURORA_CACHE",
        )  # fmt: skip
    log.warning("%s at %s: %d files, %.2f GB to download", model, commit[:12], len(wanted), missing / 1e9)
    for one in wanted:
        if one.name in here:
            continue
        part = folder / (one.name + _PART)
        if part.is_file() and part.stat().st_size > one.num_bytes:
            part.unlink()
        url = hub.hf_hub_url(model.repository, one.name, revision=commit, endpoint=endpoint)
        # With another encoding, a download could not continue at a byte of the file.
        headers = hub.utils.build_hf_headers() | {"Accept-Encoding": "identity"}
        with part.open("ab") as handle:
            hub.file_download.http_get(url, handle, resume_size=handle.tell(), headers=headers,
                                       expected_size=one.num_bytes, displayed_filename=one.name)  # fmt: skip
            handle.flush()
            os.fsync(handle.fileno())
        if one.digest not in (None, _hash(part, one)):
            part.unlink()
            raise UserError(f"{one.name} of {model} is not what the hub states: its {one.kind} differs", where=where,
                            hint="run the command again: it downloads this file anew")  # fmt: skip
        part.rename(folder / one.name)
    files.sync(folder)


def _hash(path: Path, file: _File) -> str:
    """A file's sha256, or the sha1 that git gives it as a blob."""
    hasher = hashlib.new(file.kind)
    if file.kind == "sha1":
        hasher.update(f"blob {file.num_bytes}\0".encode())
    with path.open("rb") as handle:
        while block := handle.read(1 << 24):
            hasher.update(block)
    return hasher.hexdigest()


@contextlib.contextmanager
def _library() -> Iterator[Any]:
    """The package huggingface_hub, which may use the network in this context, without telemetry."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    import huggingface_hub
    import huggingface_hub.file_download  # a module that the package does not load by itself
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE  # read from the environment when the package was imported
    constants.HF_HUB_OFFLINE = False
    try:
        yield huggingface_hub
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _explained(model: Model, where: str | None) -> Iterator[None]:
    """A fault of the hub or of the way to it as a UserError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{model} is given only to those who accepted its terms", where=where,
                        hint="accept them on its page, and log in: hf auth login") from error  # fmt: skip
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"the hub has no model {model.repository}, or none that is public", where=where) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{model.repository} has no revision {model.revision}", where=where) from error
    except (errors.HTTPError, OSError, ValueError) as error:
        here = model.copy()
        hint = f"without --online the copy of {here.name[:12]} in the cache is read" if here else (
            "the same command continues the download")  # fmt: skip
        if getattr(error, "response", None) is None and getattr(error, "errno", None) is None:  # nobody answered
            hint = f"is there a network? HF_ENDPOINT names another hub, such as a mirror; {hint}"
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{model} cannot be downloaded", where=where, why=why, hint=hint) from error
