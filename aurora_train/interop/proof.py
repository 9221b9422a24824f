"""Proof that an export says what the run says.

"round trip": the folder is read back by our own reader, compared tensor by tensor, and its log-probabilities of 8 texts
are compared with the run's. A mistake that our tables make in both directions alike passes it (gate and up exchanged in
a family, say). "independent" compares with another library as well, transformers, and sees those.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from aurora_train.errors import MissingExtra, UserError
from aurora_train.files import read_json, write_json
from aurora_train.interop.by_layer import log_probabilities
from aurora_train.interop.families.family import Family
from aurora_train.interop.parts import refuse_other_copies
from aurora_train.interop.placing import Opened, matched
from aurora_train.interop.proof_of_text import refuse_other_text, refuse_other_text_in_transformers
from aurora_train.interop.result import Result, published
from aurora_train.interop.source import open_source, same_bits
from aurora_train.nn.decoder_config import DecoderConfig

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
# What a program may read of an export: the card, a licence and files such as .gitattributes may be added and edited.
_DIGESTED = (".json", ".safetensors", ".jinja", ".gguf", ".bin", ".pt", ".pth", ".model", ".py", ".txt")
_ALSO_DIGESTED = ("Modelfile",)
ADAPTERS, _BASE = "adapter_config.json", ("base_model_name_or_path", "revision")
LONGEST = 64  # tokens of a text that are compared
# Mean difference of log-probabilities that rounding the weights to a dtype may make, in nats.
BOUNDS = {
    "float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2, "bf16": 5e-2, "f16": 1e-2, "q8_0": 0.5, "q4_0": 5.0, "nf4": 5.0,
}  # fmt: skip
INDEPENDENT_BOUND = 1e-3  # largest difference of log-probabilities between two programs on the same weights, float32


def model_in(folder: Path) -> Path:
    """The model of an export: its GGUF file, or the folder itself."""
    return next(folder.glob("*.gguf"), folder)


def rows_of(tokenizer: str, vocabulary: int, config: DecoderConfig) -> list[np.ndarray]:
    """The ids of the 8 texts, int32[T] each, cut to `LONGEST` and to the rows of learned positions.

    A text of which the tokenizer makes less than two ids, because its vocabulary lacks the characters, is replaced by
    drawn ids, so that there are always 8 rows. UserError for an id that the embedding does not have.
    """
    import tokenizers

    longest = min(LONGEST, config.max_length) if config.positions == "learned" else LONGEST
    backend, draw = tokenizers.Tokenizer.from_str(tokenizer), np.random.default_rng(0)
    rows = []
    for text in TEXTS:
        ids = backend.encode(text, add_special_tokens=False).ids[:longest]
        row = np.array(ids if len(ids) > 1 else draw.integers(0, vocabulary, longest), np.int32)
        if row.max() >= vocabulary:
            raise UserError(f"the tokenizer has the id {row.max()}, and the embedding {vocabulary:,} rows",
                            where="tokenizer.json")  # fmt: skip
        rows.append(row)
    return rows


def prove(result: Result, family: Family, folder: Path, dtype: str, library: str | None) -> dict[str, Any]:
    """Compare an export with its run and write `proof.json` into it. UserError, naming a tensor, if they differ.

    `dtype`: that of the export; of adapters, the one to which the run rounded their base, which is not in the export.
    `library`: "transformers" for an independent proof, or None.
    """
    opened = matched(open_source(model_in(folder)))
    if opened.source.kind == "hf":  # of a GGUF file, each block was held to its rounding when it was written
        refuse_other_tensors(result, opened, dtype)
        if result.parts is not None:
            refuse_other_copies(result.parts, opened)
    refuse_other_text(result.facts, opened.source, TEXTS)
    rows = rows_of(opened.source.tokenizer, result.vocabulary, result.config)
    wanted = log_probabilities(result.config, result.read, rows)
    found = log_probabilities(opened.config, opened.read, rows)
    difference = _mean_difference(found, wanted)
    bound = max(BOUNDS[one] for one in (dtype, *result.dtypes.values()))
    if not difference <= bound:  # a NaN is a difference, too
        raise UserError(
            f"the export's log-probabilities differ from the run's by {difference:.2g} nats on average",
            where=str(folder), why=f"rounding to {dtype} explains {bound:g}",
            hint="--merge writes the whole model" if opened.source.kind == "peft" else "--dtype float32",
        )  # fmt: skip
    says = f"read back, {_held(result, opened.source.kind, dtype)}; the 8 texts get the same ids, and their " \
           f"log-probabilities differ by {difference:.1g} nats on average"  # fmt: skip
    proof = {"kind": "round trip", "dtype": dtype, "family": family.model_type, "difference": difference,
             "texts": [row.tolist() for row in rows], "target_log_probabilities": _of_targets(found, rows)}  # fmt: skip
    if library is not None:
        largest = independent(folder, opened, rows, found)
        proof |= {"kind": "independent", "library": library, "largest_difference": largest}
        says += f"; {library} on the same folder differs by at most {largest:.1g}"
    proof |= {"says": says, "origin": published(result.record), "files": _digests(folder)}
    proof |= {"without_base": _without_base(folder)} if opened.source.kind == "peft" else {}
    write_json(folder / NAME, proof)
    return proof


def _held(result: Result, kind: str, dtype: str) -> str:
    """What a round trip has compared of the weights, by the kind of the export."""
    if kind == "peft":
        kept = "" if dtype == "float32" else f" (which kept the base in {dtype})"
        return f"every adapter over its base is the run's{kept}"
    if kind == "gguf":
        beside = "norms, biases and learned positions are float32"
        return f"every tensor is within the rounding of {dtype} of the run's ({beside})"
    return f"every tensor is the run's in {dtype}" + (
        " or in the dtype that it has in its base" if result.dtypes else "")  # fmt: skip


def refuse_other_tensors(result: Result, opened: Opened, dtype: str) -> None:
    """UserError, naming a tensor, if a folder does not hold the run's in `dtype` to the bit."""
    from aurora_train.interop.export import _as

    for name in result.shapes:
        place = opened.places.get(name)
        kind = result.dtypes.get(place.theirs, dtype) if place else dtype
        if place is None or not same_bits(opened.read(name), _as(result.read(name), kind, name)):
            raise UserError(
                f"the tensor {place.theirs if place else name} does not read back as it was written",
                where=str(opened.source.path),
            )  # fmt: skip


def _mean_difference(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    differences = [np.abs(one - other).mean() for one, other in zip(found, wanted, strict=True)]
    return float(np.mean(differences))


def _of_targets(found: list[np.ndarray], rows: list[np.ndarray]) -> list[list[float]]:
    """log p of the token that follows, at each position of each row."""
    return [one[np.arange(len(row) - 1), row[1:]].tolist() for one, row in zip(found, rows, strict=True)]


def independent(folder: Path, opened: Opened, rows: list[np.ndarray], ours: list[np.ndarray]) -> float:
    """The largest difference of log-probabilities between transformers and us. UserError beyond the bound.

    Also refused: a folder that transformers cannot load, a tensor that it misses, ignores or initialises anew, and a
    tokenizer, chat template or end of texts that it reads otherwise.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "parity", "--verify transformers") from error
    transformers.logging.set_verbosity_error()
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    except Exception as error:  # a config that it refuses, a file that it cannot read, an architecture it lacks
        raise UserError(f"transformers cannot load it: {error}", where=str(folder)) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            raise UserError(f"transformers reports {kind}: {sorted(map(str, loading[kind]))[0]}", where=str(folder))
    refuse_other_text_in_transformers(folder, opened.source, TEXTS, model.generation_config.eos_token_id)
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
    """Repeat an export's proof from its folder alone. Returns {"faults": [line], "proof": ...}.

    Raises UserError for a folder without a whole proof, and MissingExtra if an independent one cannot be repeated here.
    """
    proof = _recorded(folder)
    now = _digests(folder)
    if proof.get("without_base") and _without_base(folder) == proof["without_base"]:
        now[ADAPTERS] = proof["files"].get(ADAPTERS, "")
    faults = [f"{name} was changed or is missing" for name, digest in proof["files"].items() if now.get(name) != digest]
    faults += [f"{name} was added after the proof" for name in now if name not in proof["files"]]
    try:
        opened = matched(open_source(model_in(folder)))
        rows = [np.array(row, np.int32) for row in proof["texts"]]
        found = log_probabilities(opened.config, opened.read, rows)
        faults += _other_than(proof["target_log_probabilities"], _of_targets(found, rows))
        if proof["kind"] == "independent":
            independent(folder, opened, rows, found)
    except MissingExtra:  # which says nothing of the folder
        raise
    except UserError as fault:
        faults.append(str(fault))
    return {"faults": faults, "proof": proof}


_RECORDED = {"kind": str, "dtype": str, "family": str, "says": str, "files": dict, "texts": list,
             "target_log_probabilities": list}  # fmt: skip


def _recorded(folder: Path) -> dict[str, Any]:
    """The content of proof.json. UserError if there is none, or if it lacks what a repetition needs."""
    proof = read_json(folder / NAME)
    if proof is None:
        raise UserError(f"this folder has no {NAME}", where=str(folder), hint="aurora export RUN --to DIR writes one")
    proof = proof if isinstance(proof, dict) else {}
    lacking = [name for name, kind in _RECORDED.items() if not isinstance(proof.get(name), kind)]
    if not lacking and not all(isinstance(row, list) and {*map(type, row)} == {int} for row in proof["texts"]):
        lacking = ["texts"]
    if lacking or not proof["texts"]:
        raise UserError(
            f"the record of the proof has no usable `{[*lacking, 'texts'][0]}`", where=str(folder / NAME),
            why="the file was changed, or something else wrote it", hint="export the run again",
        )  # fmt: skip
    return proof


def _other_than(recorded: list, found: list[list[float]]) -> list[str]:
    """The fault that log-probabilities of targets differ from the recorded ones, if they do."""
    if [len(row) for row in recorded] != [len(row) for row in found]:
        return [f"{NAME} does not record one log-probability for each token of its texts"]
    largest = float(np.abs(np.concatenate(found) - np.concatenate(recorded)).max())
    if largest <= INDEPENDENT_BOUND:  # a NaN is a difference, too
        return []
    return [f"log-probabilities differ from the recorded ones by up to {largest:.2g} nats"]


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of each file but the proof and the card, by name."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in _DIGESTED or path.name in _ALSO_DIGESTED]
    digests = {}
    for path in files:
        if path.name != NAME:
            with path.open("rb") as handle:
                digests[path.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return digests


def _without_base(folder: Path) -> str | None:
    """sha256 of an adapter's settings but the name of its base, which differs from place to place; None without any.

    Another base under that name gives other log-probabilities, which the proof holds.
    """
    try:
        config = read_json(folder / ADAPTERS)
    except UserError:
        return None
    if not isinstance(config, dict):
        return None
    kept = {name: value for name, value in config.items() if name not in _BASE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

