"""The `data` section of a recipe that reads text. Free of numpy and jax: `aurora check` imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from aurora_train.config import Section, setting
from aurora_train.errors import UserError


class TokenizerConfig(Section):
    """How text becomes numbers. `byte` needs no training; `bpe` is trained on the train split alone."""

    kind: Literal["byte", "bpe", "file"] = setting("byte", help="byte, bpe (trained here) or file (a tokenizer.json)")
    vocab: int = setting(4096, ge=257, le=1_000_000, help="entries of the trained bpe vocabulary")
    path: str | None = setting(None, path_unless=(), help="a tokenizer.json, for kind: file")
    separator: str | None = setting(None, help="for kind: file, the token between documents; found when unset")


class TextDataConfig(Section):
    """Where the text comes from, how it is split, and how long a row is."""

    source: str = setting(
        "python-stdlib",
        path_unless=("python-stdlib", "hub:"),
        help="python-stdlib, a folder, a file or glob, or hub:owner/name",
    )
    pattern: str = setting("**/*", help="glob inside a folder")
    text_field: str = setting("text", help="column of a jsonl, parquet or arrow source that holds the text")
    tokenizer: TokenizerConfig = setting(TokenizerConfig())
    sequence: int = setting(256, ge=2, help="tokens per row")
    holdout_test: float = setting(0.02, ge=0, lt=1, help="share of documents kept for the score, by hash of path")
    holdout_validation: float = setting(0.01, ge=0, lt=1, help="share of documents kept for evaluation while training")
    max_documents: int | None = setting(None, ge=1, help="read only the first documents of the source, in its order")
    online: bool = setting(False, resume="free", help="allow a hub: source to use the network")


def check_data(config: TextDataConfig, base: Path | None = None) -> None:
    """Raise UserError for what can be known without reading the source. `base` is the folder of the config file."""
    if config.holdout_test + config.holdout_validation >= 1:
        raise UserError(
            "nothing would be left to train on",
            where="data.holdout_test",
            why=f"holdout_test {config.holdout_test} + holdout_validation {config.holdout_validation} is 1 or more",
            hint="data.holdout_test=0.02 data.holdout_validation=0.01",
        )
    if config.source.startswith("hub:"):
        if not config.online:
            raise UserError(
                f"{config.source} is on the network, and the network is off",
                where="data.source",
                hint="add data.online=true (--online), or download the files and name their folder as data.source",
            )
    elif config.source != "python-stdlib" and not any(character in config.source for character in "*?["):
        if not resolve(config.source, base).exists():
            raise UserError(
                f"there is no file or folder {config.source}",
                where="data.source",
                why=f"looked for {resolve(config.source, base)}",
                hint="a path is relative to the folder of the config file; python-stdlib is always there",
            )
    if config.tokenizer.kind == "file":
        if config.tokenizer.path is None:
            raise UserError(
                "kind: file needs the path of a tokenizer.json", where="data.tokenizer.path", hint="or kind: bpe"
            )
        if not resolve(config.tokenizer.path, base).is_file():
            raise UserError(
                f"there is no file {config.tokenizer.path}",
                where="data.tokenizer.path",
                why=f"looked for {resolve(config.tokenizer.path, base)}",
            )


def resolve(path: str, base: Path | None) -> Path:
    """`path` relative to `base`, the config file's folder (the current folder without one); `~` is the home folder."""
    return (Path(base or ".") / Path(path).expanduser()).absolute()
