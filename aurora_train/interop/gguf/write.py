"""Writes a model as a GGUF file for llama.cpp and Ollama: weights, tokenizer, chat template, origin.

What llama.cpp would assume otherwise than the model says is refused by key, because its result would differ without a
word. The file is read back and compared before it takes its name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aurora_train.errors import UserError
from aurora_train.files import sync
from aurora_train.interop.gguf.model import as_halves, open_gguf
from aurora_train.interop.gguf.names import ARCHITECTURES, Architecture
from aurora_train.interop.gguf.settings import heads_of, settings_of, within_context
from aurora_train.interop.gguf.vocabulary import vocabulary_of
from aurora_train.interop.placing import shape_of
from aurora_train.interop.source import OpenModel

# The format's name on the command line -> (type of matrices, type of embedding and head, `general.file_type`).
FORMATS = {"f16": ("F16", "F16", 1), "bf16": ("BF16", "BF16", 32), "q8_0": ("Q8_0", "Q8_0", 7),
           "q4_0": ("Q4_0", "Q8_0", 2)}  # fmt: skip
# The largest error of a stored value as a share of the largest of its block (of itself, for the floats): half a step,
# or a whole one for Q4_0, whose steps reach -8 but only +7; and the rounding of the block's scale to float16.
_BOUNDS = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.5 / 127 + 2.0**-11, "Q4_0": 1 / 8 + 2.0**-11}
_BLOCK = 32  # numbers with one scale, in all quantised formats written here
_BUFFER = 1 << 26  # bytes of float32 that are quantised at a time
_SMALLEST_F16 = 2.0**-24


class Stored(NamedTuple):
    """One tensor to be written."""

    name: str
    hf_name: str
    shape: tuple[int, ...]
    kind: str  # a key of `_BOUNDS`


def write_gguf(source: OpenModel, path: Path, format: str, name: str) -> list[str]:
    """Write a source's model to `path` in one of `FORMATS`. Returns remarks on what is stored otherwise than asked.

    Raises UserError for an unknown format, for a model, a setting or a tokenizer that llama.cpp does not know, and if
    the file that was written does not hold the same model.
    """
    if format not in FORMATS:
        raise UserError(f"unknown GGUF format {format!r}", where="--dtype", hint=f"one of {', '.join(FORMATS)}")
    source, context = within_context(source)
    settings, extra = settings_of(source)
    architecture = ARCHITECTURES[settings["general.architecture"]]
    stored, remarks = _plan(source, architecture, format)
    rows = next(one.shape[0] for one in stored if one.name == "token_embd.weight")
    settings |= {"general.name": name, "general.file_type": FORMATS[format][2], "general.type": "model"}
    if source.licence:
        settings["general.license"] = source.licence
    settings |= vocabulary_of(source, rows)
    beside = path.with_name(path.name + ".new")
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        _write(_begun(settings, extra, stored), beside, extra, stored, source, architecture)
        _refuse_difference(open_gguf(beside), source, stored, architecture)
        os.replace(beside, path)
        sync(path.parent)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", where=str(path)) from error
    finally:
        beside.unlink(missing_ok=True)
    return context + remarks


def _begun(settings: dict, extra: dict[str, np.ndarray], stored: list[Stored]):
    """A `gguf.GGUFWriter` that knows all there is to write but the values of the tensors."""
    import gguf

    writer = gguf.GGUFWriter(None, settings.pop("general.architecture"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in settings.items():
        _add(writer, key, value)
    for key, array in extra.items():
        writer.add_tensor_info(key, array.shape, array.dtype, array.nbytes)
    for one in stored:
        kind = gguf.GGMLQuantizationType[one.kind]
        shape = gguf.quant_shape_to_byte_shape(one.shape, kind)
        writer.add_tensor_info(one.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kind)
    return writer


def _plan(source: OpenModel, architecture: Architecture, format: str) -> tuple[list[Stored], list[str]]:
    """What is written as what: vectors in float32, matrices as asked if their rows are whole blocks."""
    matrices, outer, _ = FORMATS[format]
    tied = source.config.get("tie_word_embeddings", True)
    stored, uneven = [], []
    for hf_name, tensor in source.tensors.items():
        if hf_name == "lm_head.weight" and tied:
            continue
        name = architecture.gguf_name(hf_name)
        if name is None:
            raise UserError(f"GGUF has no place for the tensor {hf_name}", where=str(source.path))
        shape = tensor.shape[::-1] if architecture.is_transposed(hf_name) else tensor.shape
        kind = outer if name in ("token_embd.weight", "output.weight") else matrices
        if len(shape) == 1 or name == "position_embd.weight":
            kind = "F32"
        elif kind.startswith("Q") and shape[-1] % _BLOCK:
            uneven.append(name)
            kind = "F16"
        stored.append(Stored(name, hf_name, shape, kind))
    named, number = ", ".join(uneven[:2]) + (", ..." if len(uneven) > 2 else ""), len(uneven)
    what = "1 matrix is" if number == 1 else f"{number} matrices are"
    remark = f"{what} stored as f16, because the rows are no multiple of {_BLOCK}: {named}"
    return stored, [remark] if uneven else []


def _add(writer, key: str, value) -> None:
    """One metadata value, with GGUF's type for it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _write(
    writer, path: Path, extra: dict, stored: list[Stored], source: OpenModel, architecture: Architecture
) -> None:
    import gguf

    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    for array in extra.values():
        writer.write_padding(file, file.tell())
        array.tofile(file)
    for one in stored:
        writer.write_padding(file, file.tell())
        for block in _blocks(source, one, architecture):
            gguf.quantize(block, gguf.GGMLQuantizationType[one.kind]).tofile(file)
    writer.write_padding(file, file.tell())
    file.flush()
    os.fsync(file.fileno())
    writer.close()


def _blocks(source: OpenModel, one: Stored, architecture: Architecture) -> Iterator[np.ndarray]:
    """The rows of a tensor as the file has them, float32, a few at a time where their order is the same."""
    tensor = source.tensors[one.hf_name]
    if architecture.is_transposed(one.hf_name):
        yield np.ascontiguousarray(tensor.whole().astype(np.float32).T)
        return
    if architecture.is_permuted(one.hf_name):
        heads = heads_of(source.config, one.hf_name)
        yield tensor.whole().astype(np.float32)[np.argsort(as_halves(tensor.shape[0], heads))]
        return
    plus = np.float32(architecture.norm_plus_one and architecture.is_norm(one.hf_name))
    for start, stop in _parts(tensor.shape):
        yield tensor.read(start, stop).astype(np.float32) + plus


def _parts(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    rows = max(1, _BUFFER // (4 * math.prod(shape[1:])))
    return ((start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def _refuse_difference(back: OpenModel, source: OpenModel, stored: list[Stored], architecture: Architecture) -> None:
    """UserError if the file that was written does not hold the source's model, naming the key or the tensor."""
    ours, theirs = shape_of(source)[1], shape_of(back)[1]
    for field in type(ours).model_fields:
        if getattr(ours, field) != getattr(theirs, field):
            raise UserError(f"the GGUF file would say {field}={getattr(theirs, field)} where the model has "
                            f"{getattr(ours, field)}", where=str(source.path))  # fmt: skip
    for one in stored:
        wanted, found = source.tensors[one.hf_name], back.tensors[one.hf_name]
        whole = architecture.is_transposed(one.hf_name)  # its blocks of 32 numbers lie across the rows
        for part in [(0, wanted.shape[0])] if whole else _parts(wanted.shape):
            error = _excess(wanted.read(*part), found.read(*part), one, architecture)
            if not error <= 0:
                raise UserError(
                    f"the tensor {one.hf_name} would come back different in {one.kind}", where=str(source.path),
                    why=f"an error is {error:.3g} larger than rounding explains",
                )  # fmt: skip


def _excess(wanted: np.ndarray, found: np.ndarray, one: Stored, architecture: Architecture) -> float:
    """By how much the largest error exceeds the rounding of the format; at most 0 for a faithful copy."""
    wanted = wanted.astype(np.float32)
    if architecture.is_transposed(one.hf_name):
        wanted, found = wanted.T, found.T
    scale, error = np.abs(wanted), np.abs(wanted - found)
    if one.kind.startswith("Q"):
        blocks = (*wanted.shape[:-1], -1, _BLOCK)
        scale, error = scale.reshape(blocks).max(-1), error.reshape(blocks).max(-1)
    slack = {"F32": 0.0, "Q8_0": 127 * _SMALLEST_F16, "Q4_0": 8 * _SMALLEST_F16}.get(one.kind, _SMALLEST_F16)
    if architecture.norm_plus_one and architecture.is_norm(one.hf_name):
        slack = 2.0**-23 * (1 + scale)  # 1 is added in float32, and taken away again
    return float(np.max(error - _BOUNDS[one.kind] * scale - slack))
