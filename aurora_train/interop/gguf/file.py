"""Reads a GGUF container: metadata and tensors, the latter by blocks of rows straight from the mapped file.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every length is checked against the file before it
is used. The package `gguf` dequantises; its own reader is not used, because it takes 12 seconds for a vocabulary of
256,000 tokens and reads a truncated file without noticing.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aurora_train.errors import UserError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# The types of metadata values, in the order of their numbers; 8 is a string and 9 an array.
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
            12: "<f8"}  # fmt: skip
_STRING, _ARRAY = 8, 9
READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_K", "Q4_K", "Q6_K")


class Tensor(NamedTuple):
    """A stored tensor. `shape` is in NumPy's order (rows first), the reverse of the file's own."""

    name: str
    shape: tuple[int, ...]
    quantisation: str  # one of `READABLE`
    offset: int  # in bytes from the start of the file
    row_bytes: int  # bytes of one row, the last axis


class GgufFile:
    """An open GGUF file: `metadata` (plain Python values by key) and `tensors` by name.

    Raises UserError for a file that is not GGUF, is truncated, is one part of several, is big-endian, or holds a tensor
    in a quantisation that is not one of `READABLE`.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
        self._cursor = _Cursor(self._map, self.path)
        tensor_count, value_count = self._counts()
        self.metadata = self._metadata(value_count)
        self._refuse_part()
        self.tensors = self._tensors(tensor_count)

    def read(self, name: str, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """float32 of a tensor, or of some of its rows along the first axis. Only these rows are read and dequantised.

        Raises KeyError for an unknown name.
        """
        import gguf

        tensor = self.tensors[name]
        count = math.prod(tensor.shape[:-1])
        stored = np.frombuffer(self._map, np.uint8, count * tensor.row_bytes, tensor.offset)
        if len(tensor.shape) == 1:
            return gguf.dequantize(stored, gguf.GGMLQuantizationType[tensor.quantisation]).astype(np.float32)[rows]
        stored = stored.reshape(*tensor.shape[:-1], tensor.row_bytes)[rows]
        floats = gguf.dequantize(np.ascontiguousarray(stored), gguf.GGMLQuantizationType[tensor.quantisation])
        return np.array(floats, np.float32).reshape(len(stored), *tensor.shape[1:])

    def _counts(self) -> tuple[int, int]:
        cursor = self._cursor
        if self._map[:4] != MAGIC:
            raise UserError(
                "not a GGUF file", where=str(self.path), why=f"it begins with {bytes(self._map[:4])!r}, not {MAGIC!r}",
                hint="a folder of safetensors files is named by the folder",
            )  # fmt: skip
        cursor.at = 4
        version = cursor.number("<u4")
        if version not in _VERSIONS:
            swapped = struct.unpack(">I", struct.pack("<I", version))[0] in _VERSIONS
            what = "a big-endian GGUF file" if swapped else f"version {version} of GGUF"
            raise UserError(f"{what} is not supported", where=str(self.path),
                            hint=f"little-endian files of version {' or '.join(map(str, _VERSIONS))} are")  # fmt: skip
        return cursor.number("<u8"), cursor.number("<u8")

    def _metadata(self, count: int) -> dict[str, Any]:
        cursor, metadata = self._cursor, {}
        for _ in range(count):
            key = cursor.string(f"a key of the metadata after {next(reversed(metadata), 'the header')!r}")
            if key in metadata:
                raise cursor.damaged(f"the metadata key {key!r} is there twice")
            metadata[key] = cursor.value(cursor.number("<u4"), f"the metadata value {key!r}")
        return metadata

    def _refuse_part(self) -> None:
        parts = self.metadata.get("split.count", 1)
        if parts > 1:
            raise UserError(
                f"this is part {self.metadata.get('split.no', 0) + 1} of {parts} of a split GGUF file",
                where=str(self.path), hint="join the parts with `llama-gguf-split --merge FIRST_PART WHOLE`",
            )  # fmt: skip

    def _tensors(self, count: int) -> dict[str, Tensor]:
        cursor, found = self._cursor, []
        for number in range(count):
            name = cursor.string(f"the name of tensor {number}")
            num_axes = cursor.number("<u4")
            if not 1 <= num_axes <= 4:
                raise cursor.damaged(f"tensor {name} has {num_axes} axes")
            shape = tuple(cursor.number("<u8") for _ in range(num_axes))[::-1]
            found.append((name, shape, cursor.number("<u4"), cursor.number("<u8")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise cursor.damaged(f"general.alignment is {alignment!r}")
        start = -(-cursor.at // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in found:
            if name in tensors:
                raise cursor.damaged(f"the tensor {name} is there twice")
            tensors[name] = self._checked(name, shape, kind, start + offset)
        return tensors

    def _checked(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
        """The tensor, once its quantisation can be read and all of its bytes are in the file."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        known = {int(one): one for one in GGMLQuantizationType}.get(kind)
        if known is None or known.name not in READABLE:
            stored = f"as {known.name}" if known else f"in a quantisation of unknown number {kind}"
            raise UserError(
                f"the tensor {name} is stored {stored}, which cannot be read", where=str(self.path),
                why=f"readable are {', '.join(READABLE)}", hint="use another file of the model",
            )  # fmt: skip
        block, block_bytes = GGML_QUANT_SIZES[known]
        if shape[-1] % block or not math.prod(shape):
            raise self._cursor.damaged(f"the tensor {name} of shape {list(shape)} is no whole number of {known.name} "
                                       f"blocks of {block}")  # fmt: skip
        row_bytes = shape[-1] // block * block_bytes
        end = offset + math.prod(shape[:-1]) * row_bytes
        if end > len(self._map):
            raise UserError(
                f"truncated: the tensor {name} ends at byte {end:,}, the file at {len(self._map):,}",
                where=str(self.path), hint="download or copy the file again",
            )  # fmt: skip
        return Tensor(name, shape, known.name, offset, row_bytes)


class _Cursor:
    """Reads the values of the header in order, and never beyond the end of the file."""

    def __init__(self, content, path: Path):
        self._content, self._path, self.at = content, path, 0

    def damaged(self, what: str) -> UserError:
        return UserError(f"damaged: {what}", where=str(self._path), hint="download or copy the file again")

    def number(self, dtype: str):
        return self._array(dtype, 1, "the header").item()

    def string(self, what: str) -> str:
        content = bytes(self._take(self.number("<u8"), what))
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8") from None

    def value(self, kind: int, what: str):
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            of, length = self.number("<u4"), self.number("<u8")
            if of == _STRING:
                return self._strings(length, what)
            return self._array(self._scalar(of, what), length, what).tolist()
        return self._array(self._scalar(kind, what), 1, what).item()

    def _scalar(self, kind: int, what: str) -> str:
        if kind not in _SCALARS:
            raise self.damaged(f"{what} is of unknown type {kind}")
        return _SCALARS[kind]

    def _strings(self, length: int, what: str) -> list[str]:
        if length > (len(self._content) - self.at) // 8:  # each has at least its own length, eight bytes
            raise self._short(what)
        return [self.string(what) for _ in range(length)]

    def _array(self, dtype: str, length: int, what: str) -> np.ndarray:
        return np.frombuffer(self._take(length * np.dtype(dtype).itemsize, what), dtype)

    def _take(self, size: int, what: str):
        end = self.at + size
        if end > len(self._content):
            raise self._short(what)
        taken = self._content[self.at : end]
        self.at = end
        return taken

    def _short(self, what: str) -> UserError:
        return UserError(f"truncated: the file ends within {what}, at byte {len(self._content):,}",
                         where=str(self._path), hint="download or copy the file again")  # fmt: skip
