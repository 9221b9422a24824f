"""The `data` section of a recipe that reads text. Free of numpy and jax: `aurora check` imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from aurora_train.config import Section, setting
from aurora_train.errors import UserError


class TokenizerConfig(Section):
    """How text becomes numbers. `byte` needs no training; `bpe` is trained only on the train split."""

    kind: Literal["auto", "byte", "bpe", "file", "inherited"] = setting(
        "auto",
        help="byte, bpe (trained here), file (a tokenizer.json), inherited (that of the model or run which "
        "model.from or init.from names), or auto: file if a path is given, else inherited, else byte",
    )
    vocab: int = setting(
        4096, ge=257, le=1_000_000,
        help="entries of the trained bpe vocabulary; kind: inherited: those of a plan whose model is not named yet",
    )
    split: Literal["code", "gpt2"] = setting(
        "code", help="where bpe does not merge: code (fewer tokens on code), gpt2 (a rule of llama.cpp, for GGUF)"
    )
    path: str | None = setting(None, resume="located", path_unless=(), help="a tokenizer.json")
    separator: str | None = setting(None, help="for kind: file, the token between documents; detected when unset")

    @model_validator(mode="before")
    @classmethod
    def _path_means_file(cls, given):
        """A path without a kind implies kind: file. ValueError for settings that it would make ineffective."""
        if not isinstance(given, dict) or given.get("path") is None or given.get("kind", "auto") != "auto":
            return given
        if "vocab" in given and "kind" not in given:
            raise ValueError("a tokenizer.json (path) has its own vocabulary: leave vocab out")
        return {**given, "kind": "file"}

    @model_validator(mode="after")
    def _split_is_of_bpe(self):
        if self.split != "code" and self.kind != "bpe":
            raise ValueError(f"split: {self.split} is for a tokenizer that is trained here: kind: bpe")
        return self


class MixedSourceConfig(Section):
    """One of several sources of a mixture. Its name begins the names of its documents."""

    source: str = setting(
        resume="located",
        path_unless=("python-stdlib", "hub:"),
        help="python-stdlib, a folder, a file or glob, or hub:owner/name",
    )
    weight: float = setting(1.0, gt=0, help="its share of the training rows, relative to the others' weights")
    pattern: str = setting("**/*", help="glob inside a folder")
    text_field: str = setting("text", help="column of a table that holds the text")
    max_documents: int | None = setting(None, ge=1, help="read only the first documents of the source, in its order")


class TextDataConfig(Section):
    """Where the text comes from, how it is split, and how long a row is."""

    source: str = setting(
        "python-stdlib",
        resume="located",
        path_unless=("python-stdlib", "hub:"),
        help="python-stdlib, a folder, a file or glob, or hub:owner/name",
    )
    mix: dict[str, MixedSourceConfig] = setting({}, help="several named sources, {source, weight} each, instead of one")
    pattern: str = setting("**/*", help="glob inside a folder")
    text_field: str = setting("text", help="column of a table that holds the text")
    tokenizer: TokenizerConfig = setting(TokenizerConfig())
    sequence: int = setting(256, ge=2, help="tokens per row")
    holdout_test: float = setting(0.02, ge=0, lt=1, help="share of documents kept for the score, by hash of path")
    holdout_validation: float = setting(0.01, ge=0, lt=1, help="share of documents kept for evaluation while training")
    max_documents: int | None = setting(None, ge=1, help="read only the first documents of the source, in its order")
    online: bool = setting(False, resume="free", help="allow a hub: source or model to use the network")


ALL_HELD_OUT = 1.0  # a `holdout_test` that a config may not set: no text is left to train on


def use_of(data) -> tuple[str, str]:
    """(the split that data are prepared for, what is done with it), in a line to the user: all of `on` is scored."""
    return ("test", "score") if data.holdout_test == ALL_HELD_OUT else ("train", "train on")


def check_settings(config: TextDataConfig, base: Path | None = None) -> None:
    """Raise UserError for settings that are wrong for any source. `base` is the folder of the config file."""
    check_shares(config)
    if config.mix:
        check_mix(config, "source", "pattern", "max_documents")
    check_tokenizer(config.tokenizer, base)


def check_shares(config) -> None:
    """Raise UserError if `holdout_test` and `holdout_validation` of the `data` section leave nothing to train on."""
    if config.holdout_test != ALL_HELD_OUT and config.holdout_test + config.holdout_validation >= 1:
        raise UserError(
            "nothing would be left to train on",
            where="data.holdout_test",
            why=f"holdout_test {config.holdout_test} + holdout_validation {config.holdout_validation} is 1 or more",
            hint="data.holdout_test=0.02 data.holdout_validation=0.01",
        )


def check_mix(config, *single: str) -> None:
    """Raise UserError for a name that a source of a mixture cannot have, and if one of the fields `single` of the
    `data` section, which describe a single source, is set beside the mixture."""
    fields = type(config).model_fields
    if any(getattr(config, name) != fields[name].default for name in single):
        *first, last = (f"data.{name}" for name in single)
        raise UserError(
            "a mixture has its sources in data.mix alone", where="data.source",
            why=f"{', '.join(first)} and {last} belong to a run with one source",
            hint="move it into the mixture: data.mix.NAME.source=... data.mix.NAME.weight=1",
        )  # fmt: skip
    for name in config.mix:
        if not name or not all(character.isalnum() or character in "-_." for character in name):
            raise UserError(
                f"a source of a mixture cannot be called {name!r}", where="data.mix",
                why="its name begins the names of its documents", hint="use only letters, digits, - _ and .",
            )  # fmt: skip


def check_tokenizer(config: TokenizerConfig, base: Path | None) -> None:
    """Raise UserError for settings of a tokenizer that are wrong for any source."""
    if config.kind != "file":
        for name in ("path", "separator"):
            if getattr(config, name) is not None:
                raise UserError(
                    f"a {name} goes with a tokenizer.json, but the tokenizer is of kind: {config.kind}",
                    where=f"data.tokenizer.{name}",
                    hint=f"data.tokenizer.kind=file, or leave {name} out",
                )
        return
    if config.path is None:
        what = "kind: file needs the path of a tokenizer.json"
        raise UserError(what, where="data.tokenizer.path", hint="or kind: bpe")
    path = resolve(config.path, base)
    if not path.is_file():
        inside = path / "tokenizer.json"
        raise UserError(
            f"{config.path} is a folder" if path.is_dir() else f"there is no file {config.path}",
            where="data.tokenizer.path",
            why=f"looked for {path}",
            hint=f"data.tokenizer.path={inside}" if inside.is_file() else None,
        )


def resolve(path: str, base: Path | None) -> Path:
    """`path` relative to `base`, the config file's folder (the current folder without one); `~` is the home folder."""
    return (Path(base or ".") / Path(path).expanduser()).absolute()
