"""Writes a run as a Hugging Face folder: weights, config, tokenizer, chat template, generation config and card.

The folder is written beside its name and renamed when its proof holds (`interop/proof.py`): a folder that exists under
its own name was read back and compared with the run.
"""

from __future__ import annotations

import functools
import json
import math
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aurora_train.errors import UserError
from aurora_train.files import sync, write_json
from aurora_train.interop import families
from aurora_train.interop.families.family import Family
from aurora_train.interop.hf import DTYPES as STORED
from aurora_train.interop.hf import INDEX
from aurora_train.interop.kept import ORIGIN, TEMPLATE
from aurora_train.interop.placing import Theirs, their_shapes, theirs
from aurora_train.interop.result import Result
from aurora_train.interop.tokenizer_files import special_tokens, tokenizer_json

DTYPES = ("float32", "bfloat16", "float16")
_SAFETENSORS = {ours: theirs for theirs, ours in STORED.items()}
SHARD_BYTES = 4 << 30
CARD = "README.md"


def refuse_target(folder: Path) -> None:
    """UserError if an export would overwrite something, or replace the folder in which the command runs."""
    if folder.resolve() == Path.cwd():
        raise UserError("this is the folder in which the command runs, and an export replaces the one that it is "
                        "written to", where=str(folder), hint="name another one with --to")  # fmt: skip
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("this folder exists and is not empty", where=str(folder), hint="name another one with --to")


def default_dtype(result: Result) -> str:
    """The dtype of a base that came from elsewhere, else bfloat16 for a run trained in it, else float32."""
    of_base = (result.facts.get(ORIGIN) or {}).get("dtype")
    if of_base in DTYPES:
        return of_base
    return "float32" if result.record["precision"] == "float32" else "bfloat16"


def beside(folder: Path) -> Path:
    """A new folder beside `folder`, in which an export is made. Its name is drawn: no other export has the same."""
    folder = folder.resolve()
    made = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        made.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(made)) from error
    return made


def put_in_place(made: Path, folder: Path) -> None:
    """Give a folder that was made beside its name that name, once its files are on the disk."""
    folder = folder.resolve()
    try:
        for path in (*made.iterdir(), made):
            sync(path)
        made.rename(folder)  # takes the place of an empty folder
        sync(folder.parent)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(folder)) from error


def write_folder(result: Result, folder: Path, dtype: str) -> Family:
    """Write a result into an empty folder. Returns the family as which it was written.

    Tensors that `result.dtypes` names are stored as it says, all others in `dtype`. Raises UserError for a model that
    no published family has, and for a disk that is full.
    """
    family = families.expressing(result.config, (result.facts.get(ORIGIN) or {}).get("family"))
    try:
        heads = result.config.heads
        shapes = their_shapes(family, result.shapes, heads)
        arrays = theirs(family, result.shapes, heads, result.read)
        _write_weights(_stored(result, arrays, shapes, dtype), folder)
        tokens = special_tokens(result.facts)
        config = _config(result, family, dtype, tokens)
        write_json(folder / "config.json", config if result.parts is None else result.parts.merged(config))
        if result.parts is not None:
            result.parts.copy_files(folder)
        ids = {name: value for name, value in tokens.ids.items() if value is not None}
        generation = (result.facts.get(ORIGIN) or {}).get("generation", {})
        write_json(folder / "generation_config.json", generation | ids)
        write_tokenizer(result, folder)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(folder)) from error
    return family


def write_tokenizer(result: Result, folder: Path) -> None:
    """Write the tokenizer of a result and its chat template, if it has one."""
    (folder / "tokenizer.json").write_text(tokenizer_json(result.facts), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_max_length": _reach(result), "model_input_names": ["input_ids", "attention_mask"],
        **(result.facts.get(ORIGIN) or {}).get("tokenizer", {}), **special_tokens(result.facts).texts,
    })  # fmt: skip
    if TEMPLATE in result.facts:
        (folder / TEMPLATE).write_bytes(result.facts[TEMPLATE])


def _reach(result: Result) -> int:
    """The longest row that the model is meant for."""
    if result.config.positions == "learned":
        return result.config.max_length
    return (result.facts.get(ORIGIN) or {}).get("max_length") or result.record["sequence"] or result.config.max_length


def _config(result: Result, family: Family, dtype: str, tokens) -> dict[str, Any]:
    config = families.write_config(result.config, family)
    reach = {} if result.config.positions == "learned" else {"max_position_embeddings": _reach(result)}
    # `torch_dtype` is for readers from before transformers 5.
    return config | reach | tokens.ids | {"vocab_size": result.vocabulary, "dtype": dtype, "torch_dtype": dtype}


class _Stored(NamedTuple):
    """A tensor of the export. `made` reads its array, which is of this shape and dtype and C-contiguous."""

    shape: tuple[int, ...]
    dtype: str
    made: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _numpy(self.dtype).itemsize


def _stored(result: Result, arrays: Theirs, shapes: dict[str, tuple[int, ...]], dtype: str) -> dict[str, _Stored]:
    """Every tensor of the export by its name: those of the text model, in `dtype` or as `result.dtypes` says, then the
    copied ones."""

    def made(name: str, kind: str) -> np.ndarray:
        return np.asarray(_as(arrays[name](), kind, name), order="C")

    found, parts = {}, result.parts
    for name, shape in shapes.items():
        stored_as, kind = parts.names.get(name, name) if parts else name, result.dtypes.get(name, dtype)
        found[stored_as] = _Stored(shape, kind, functools.partial(made, name, kind))
    for name, tensor in (parts.tensors if parts else {}).items():
        found[name] = _Stored(tensor.shape, tensor.dtype, tensor.whole)
    return found


def _write_weights(tensors: dict[str, _Stored], folder: Path) -> None:
    shards = list(_shards(tensors))
    index, total = {}, 0
    for number, names in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _write_shard({one: tensors[one] for one in names}, folder / name)
        index |= dict.fromkeys(names, name)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _write_shard(tensors: dict[str, _Stored], path: Path) -> int:
    """Write a safetensors file, one tensor in memory at a time. Returns the bytes of its tensors.

    The format: 8 bytes of length, a JSON header padded with spaces to a multiple of 8, and the tensors one after the
    other, those with the widest numbers first, so that each begins at a multiple of its width. The library writes the
    same bytes, but takes all tensors at once.
    """
    order = list(_SAFETENSORS)
    tensors = dict(sorted(tensors.items(), key=lambda named: (order.index(named[1].dtype), named[0])))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, one in tensors.items():
        start, end = end, end + one.num_bytes
        header[name] = {"dtype": _SAFETENSORS[one.dtype], "shape": list(one.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, one in tensors.items():
            array = one.made()
            assert array.shape == one.shape and array.nbytes == one.num_bytes, name
            file.write(array.view(np.uint8).data if array.ndim else array.tobytes())
    return end


def _shards(tensors: dict[str, _Stored]) -> Iterator[list[str]]:
    names, held = [], 0
    for name, stored in tensors.items():
        if names and held + stored.num_bytes > SHARD_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += stored.num_bytes
    yield names


def _numpy(dtype: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _as(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    cast = array.astype(_numpy(dtype))
    if dtype == "float16" and not np.isfinite(cast).all() and np.isfinite(array).all():
        raise UserError(f"{name} has values beyond the range of float16", where="--dtype", hint="--dtype bfloat16")
    return cast


def about(result: Result, family: Family, folder: Path, dtype: str) -> dict[str, Any]:
    """What the record of an export, and so its card, says of it beside what the run's own lineage has."""
    record = result.record
    alone = (folder / "adapter_config.json").is_file()
    own = f", {len(result.dtypes)} of its tensors in the dtype of its base" if result.dtypes else ""
    stored = f"Its weights are stored in {dtype}{own}."
    if alone:
        stored = "These are its LoRA adapters alone, in float32; the base is named in `adapter_config.json`."
    known = ("run", "step", "recipe", "base", "licence", "parts")
    return {
        "library_name": "peft" if alone else "transformers", "pipeline_tag": "text-generation", "dtype": dtype,
        "what": f"A model of the family {family.title}", "stored": stored, **{name: record.get(name) for name in known},
    }  # fmt: skip
