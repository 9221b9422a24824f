"""Reads a Hugging Face folder: config.json, one or more safetensors files, the tokenizer and the chat template.

Only headers are read when a folder is opened. Formats that hold something else than plain weights are refused by name,
because a reader that dequantised them in passing would hand over weights that nobody trained.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aurora_train.errors import UserError
from aurora_train.files import gguf_in
from aurora_train.interop.source import OpenModel, Tensor

# Every dtype that is read, the widest first, as safetensors orders the tensors of a file.
DTYPES = {
    "U64": "uint64", "I64": "int64", "F64": "float64", "F32": "float32", "U32": "uint32", "I32": "int32",
    "BF16": "bfloat16", "F16": "float16", "U16": "uint16", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
INDEX = "model.safetensors.index.json"
_WEIGHTS = ("float64", "float32", "bfloat16", "float16")
_CONVERT = "take the release in bfloat16, or dequantise it with the library that made it"


def open_folder(folder: Path) -> OpenModel:
    """The source in a folder. UserError as `open_source` says."""
    config = read_json(folder / "config.json", required=True)
    _refuse_quantised(config, folder)
    config_of_text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    return OpenModel(
        path=folder, kind="hf", config=config, tensors=_tensors(folder), tokenizer=read_text(folder / "tokenizer.json"),
        tokenizer_config=tokenizer_config, chat_template=_template(folder, tokenizer_config),
        generation=read_json(folder / "generation_config.json") or _ids(config) or _ids(config_of_text),
        licence=_licence(folder),
    )  # fmt: skip


def _ids(config: dict) -> dict:
    return {name: config[name] for name in ("eos_token_id",) if config.get(name) is not None}


def read_json(path: Path, *, required: bool = False) -> dict:
    """The mapping in a JSON file; {} if there is none and it is not `required`. UserError for any other content."""
    text = read_text(path)
    if text is None and required:
        pickles = sorted(path.parent.glob("*.bin")) + sorted(path.parent.glob("*.pt*"))
        hint = "a folder with config.json and *.safetensors, a *.gguf file, or a run folder"
        what = f"this folder has no {path.name}" if path.parent.is_dir() else "this is not a folder"
        what = f"{pickles[0].name} is a pickle, which may run any code when read" if pickles else what
        raise UserError(what, where=str(path.parent), hint=gguf_in(path.parent) or hint)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg}", where=f"{path}:{error.lineno}:{error.colno}") from error
    if not isinstance(value, dict):
        raise UserError("this JSON file holds no mapping", where=str(path))
    return value


def read_text(path: Path) -> str | None:
    """The content of a text file; None if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=str(path)) from error


def _refuse_quantised(config: dict, folder: Path) -> None:
    found = config.get("quantization_config") or config.get("compression_config")
    if found is None:
        return
    method = found.get("quant_method", "an unnamed method") if isinstance(found, dict) else str(found)
    named = {"fp8": "FP8", "bitsandbytes": "bitsandbytes", "awq": "AWQ", "gptq": "GPTQ"}.get(method, method)
    raise UserError(
        f"the weights are stored in {named}", where=str(folder / "config.json"),
        why="they were rounded after training, and training would begin from what is left of them", hint=_CONVERT,
    )  # fmt: skip


def _template(folder: Path, tokenizer_config: dict) -> str | None:
    """The chat template: of its own file, else of the tokenizer's config, where several may have names."""
    beside = read_text(folder / "chat_template.jinja")
    if beside is not None:
        return beside
    found = tokenizer_config.get("chat_template")
    if isinstance(found, list):
        by_name = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        return by_name.get("default")
    return found if isinstance(found, str) else None


def _licence(folder: Path) -> str | None:
    """The licence that the model card's header names."""
    card = read_text(folder / "README.md") or ""
    head = card.split("\n---", 1)[0] if card.startswith("---") else ""
    found = re.search(r"^license:\s*['\"]?([\w.-]+)", head, re.MULTILINE)
    return found[1] if found else None


def _tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / INDEX).is_file():
        return _sharded(folder)
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [path.name for path in (*sorted(folder.glob("*.bin")), *sorted(folder.glob("*.pt*")))]
        what = f"{pickles[0]} is a pickle, which may run any code when read" if pickles else "no *.safetensors here"
        raise UserError(what, where=str(folder), hint="save the model again with safe_serialization=True")
    if len(files) > 1:
        raise UserError(
            f"there are {len(files)} safetensors files and no {INDEX} that says what they hold", where=str(folder),
            hint="copy the index from where the files came from",
        )  # fmt: skip
    return tensors_of_file(files[0])


def _sharded(folder: Path) -> dict[str, Tensor]:
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError("the index has no `weight_map`", where=str(folder / INDEX))
    astray = next((name for name, file in listed.items() if not isinstance(file, str)), None)
    if astray is not None:
        raise UserError(f"weight_map of {astray} is {listed[astray]!r}, which names no file", where=str(folder / INDEX))
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(listed.values())):
        if not (folder / name).is_file():
            raise UserError(f"the index names the file {name}, which is not here", where=str(folder / INDEX))
        found = tensors_of_file(folder / name)
        twice = next((one for one in found if one in tensors), None)
        if twice is not None:
            raise UserError(f"{twice} is in two files, the second is {name}", where=str(folder / INDEX))
        tensors |= found
    astray = sorted(listed.keys() ^ tensors.keys())
    if astray:
        where = "only in the index" if astray[0] in listed else "in a file, but not in the index"
        raise UserError(f"{astray[0]} is {where}", where=str(folder / INDEX), why=_more(astray))
    return tensors


def _more(names: list[str]) -> str | None:
    return f"{len(names) - 1} more do not agree either" if len(names) > 1 else None


def tensors_of_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, by its header. UserError for a cut file and for a dtype that NumPy
    does not have."""
    from safetensors import SafetensorError, safe_open

    def asked(what: Callable[[], Any]):
        try:
            return what()
        except (SafetensorError, OSError) as error:
            raise UserError(f"not a whole safetensors file: {error}", where=str(path)) from error

    handle = asked(lambda: safe_open(path, framework="numpy"))
    tensors = {}
    for name in handle.keys():  # noqa: SIM118 (a handle is not a dict)
        part = handle.get_slice(name)
        dtype = DTYPES.get(part.get_dtype())
        if dtype is None:
            stored = part.get_dtype()
            kind = "FP8" if stored.startswith("F8") else f"the dtype {stored}"
            raise UserError(f"{name} is stored in {kind}", where=str(path), why=f"read are {', '.join(DTYPES)}",
                            hint=_CONVERT)  # fmt: skip
        shape = tuple(part.get_shape())
        tensors[name] = Tensor(shape, dtype, functools.partial(_rows, handle, name, asked, bool(shape)))
    return tensors


def refuse_codes(tensors: dict[str, Tensor], where: str) -> None:
    """UserError for a tensor of whole numbers: it holds the codes of weights, or something else than weights."""
    name = next((name for name, tensor in tensors.items() if tensor.dtype not in _WEIGHTS), None)
    if name is not None:
        raise UserError(f"{name} is stored in the dtype {tensors[name].dtype}", where=where,
                        why=f"weights are {', '.join(_WEIGHTS)}", hint=_CONVERT)  # fmt: skip


def _rows(handle, name: str, asked, has_rows: bool, start: int, stop: int):
    return asked(lambda: handle.get_slice(name)[start:stop] if has_rows else handle.get_tensor(name))
