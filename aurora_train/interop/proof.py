"""Proof that an export says what the run says.

"round trip": the folder is read back by our own reader, compared tensor by tensor, and its log-probabilities of 8 texts
are compared with the run's. A mistake that our tables make in both directions alike passes it (gate and up exchanged in
a family, say). "independent" compares with another library as well, transformers, and sees those.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aurora_train.errors import MissingExtra, UserError
from aurora_train.files import read_json, write_json
from aurora_train.interop.by_layer import log_probabilities
from aurora_train.interop.families.family import Family
from aurora_train.interop.placing import Opened, matched
from aurora_train.interop.result import Result
from aurora_train.interop.source import open_source

NAME = "proof.json"
TEXTS = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "In 1905, Albert Einstein published four papers; the third introduced special relativity.",
    "Zażółć gęślą jaźń — ein Satz mit Ümläuten, и немного кириллицы.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144",
    "Question: What is 17 times 23?\nAnswer: 391\n",
    '{"name": "box", "watts": 240, "tags": ["quiet", "small"]}',
    "she sells sea shells by the sea shore " * 4,
)
_DIGESTED = (".json", ".safetensors", ".jinja", ".gguf")
LONGEST = 64  # tokens of a text that are compared
# Mean difference of log-probabilities that rounding the weights to a dtype may make, in nats.
BOUNDS = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2, "bf16": 5e-2, "f16": 1e-2, "q8_0": 0.5, "q4_0": 5.0}
INDEPENDENT_BOUND = 1e-3  # largest difference of log-probabilities between two programs on the same weights, float32


def model_in(folder: Path) -> Path:
    """The model of an export: its GGUF file, or the folder itself."""
    return next(folder.glob("*.gguf"), folder)


def rows_of(tokenizer: str, vocabulary: int) -> list[np.ndarray]:
    """The ids of the 8 texts, cut to `LONGEST`."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer)
    rows = [np.array(backend.encode(text, add_special_tokens=False).ids[:LONGEST], np.int32) for text in TEXTS]
    return [row for row in rows if len(row) > 1 and row.max() < vocabulary]


def prove(result: Result, family: Family, folder: Path, dtype: str, library: str | None) -> dict[str, Any]:
    """Compare an export with its run and write `proof.json` into it. UserError, naming a tensor, if they differ.

    `library`: "transformers" for an independent proof, or None.
    """
    opened = matched(open_source(model_in(folder)))
    if opened.source.kind == "hf":  # of a GGUF file, each block was held to its rounding when it was written
        _refuse_other_tensors(result, opened, dtype)
    rows = rows_of(opened.source.tokenizer, result.vocabulary)
    wanted = log_probabilities(result.config, result.read, rows)
    found = log_probabilities(opened.config, opened.read, rows)
    difference = _mean_difference(found, wanted)
    if not difference <= BOUNDS[dtype]:  # a NaN is a difference, too
        raise UserError(
            f"the export's log-probabilities differ from the run's by {difference:.2g} nats on average",
            where=str(folder), why=f"rounding to {dtype} explains {BOUNDS[dtype]:g}", hint="--dtype float32",
        )  # fmt: skip
    says = f"read back, every tensor is the run's in {dtype}; log-probabilities of {len(rows)} texts differ by " \
           f"{difference:.1g} nats on average"  # fmt: skip
    proof = {"kind": "round trip", "dtype": dtype, "family": family.model_type, "difference": difference,
             "texts": [row.tolist() for row in rows], "target_log_probabilities": _of_targets(found, rows)}  # fmt: skip
    if library is not None:
        largest = independent(folder, rows, found)
        proof |= {"kind": "independent", "library": library, "largest_difference": largest}
        says += f"; {library} on the same folder differs by at most {largest:.1g}"
    proof |= {"says": says, "files": _digests(folder)}
    write_json(folder / NAME, proof)
    return proof


def _refuse_other_tensors(result: Result, opened: Opened, dtype: str) -> None:
    from aurora_train.interop.export import _as

    for name in result.shapes:
        wanted = _as(result.read(name), dtype, name)
        if name not in opened.shapes or not _same_bits(opened.read(name), wanted):
            place = opened.places.get(name)
            raise UserError(
                f"the tensor {place.theirs if place else name} does not read back as it was written",
                where=str(opened.source.path),
            )  # fmt: skip


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    bits = np.dtype(f"uint{8 * one.itemsize}")  # compared without a second copy, and a NaN equals itself
    return np.array_equal(one.view(bits), other.view(bits))


def _mean_difference(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    differences = [np.abs(one - other).mean() for one, other in zip(found, wanted, strict=True)]
    return float(np.mean(differences))


def _of_targets(found: list[np.ndarray], rows: list[np.ndarray]) -> list[list[float]]:
    """log p of the token that follows, at each position of each row."""
    return [one[np.arange(len(row) - 1), row[1:]].tolist() for one, row in zip(found, rows, strict=True)]


def independent(folder: Path, rows: list[np.ndarray], ours: list[np.ndarray]) -> float:
    """The largest difference of log-probabilities between transformers and us. UserError beyond the bound.

    Also refused: a tensor that transformers misses, ignores or initialises anew.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "parity", "--verify transformers") from error
    transformers.logging.set_verbosity_error()
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            raise UserError(f"transformers reports {kind}: {sorted(map(str, loading[kind]))[0]}", where=str(folder))
    largest, at = 0.0, 0
    with torch.no_grad():
        for number, (row, mine) in enumerate(zip(rows, ours, strict=True)):
            theirs = torch.log_softmax(model(torch.from_numpy(row[None].astype(np.int64))).logits[0], -1).numpy()
            difference = float(np.abs(theirs - mine).max())
            if not difference <= largest:
                largest, at = difference, number
    if not largest <= INDEPENDENT_BOUND:
        raise UserError(
            f"transformers says something else: log-probabilities differ by up to {largest:.2g} nats",
            where=str(folder), why=f"on the text {TEXTS[at][:40]!r}; the bound is {INDEPENDENT_BOUND:g}",
            hint="this is a mistake in the family's table: please report it",
        )  # fmt: skip
    return largest


def repeat(folder: Path) -> dict[str, Any]:
    """Repeat an export's proof from its folder alone. Returns {"faults": [line], "proof": ...}."""
    proof = read_json(folder / NAME)
    if proof is None:
        raise UserError(f"this folder has no {NAME}", where=str(folder), hint="aurora export RUN --to DIR writes one")
    now = _digests(folder)
    faults = [f"{name} was changed or is missing" for name, digest in proof["files"].items() if now.get(name) != digest]
    try:
        opened = matched(open_source(model_in(folder)))
    except UserError as fault:
        return {"faults": [*faults, str(fault)], "proof": proof}
    rows = [np.array(row, np.int32) for row in proof["texts"]]
    found = log_probabilities(opened.config, opened.read, rows)
    recorded, here = (np.concatenate(one) for one in (proof["target_log_probabilities"], _of_targets(found, rows)))
    largest = float(np.abs(here - recorded).max())
    if not largest <= INDEPENDENT_BOUND:
        faults.append(f"log-probabilities differ from the recorded ones by up to {largest:.2g} nats")
    faults += _repeated(proof, lambda: independent(folder, rows, found))
    return {"faults": faults, "proof": proof}


def _repeated(proof: dict[str, Any], compare: Callable[[], float]) -> list[str]:
    if proof["kind"] != "independent":
        return []
    try:
        compare()
    except UserError as fault:
        return [str(fault)]
    return []


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of each file but the proof and the card, by name."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in _DIGESTED]
    digests = {}
    for path in files:
        if path.name != NAME:
            with path.open("rb") as handle:
                digests[path.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return digests

