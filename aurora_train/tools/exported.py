"""A run as a folder that stands alone, for recipes whose models no other library knows: a robot policy, a decoder.

The folder has the weights by which the run is judged (safetensors), the facts, config, code and scores of the run, its
origin, a card, and a proof: the folder was read back, and its predictions on a batch that the recipe makes are those of
the run, to the bit. The batch and the predictions are in the folder, so that other programs can be compared with them.
It is read as a run is: `aurora act DIR` needs nothing else.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from aurora_train import facts as kept_facts
from aurora_train.check import limits
from aurora_train.check.blame import recipe_code
from aurora_train.checkpoint import layout
from aurora_train.config import dump_without_folders, load_resolved
from aurora_train.errors import UserError
from aurora_train.files import read_json, write_json
from aurora_train.interop.export import CARD
from aurora_train.interop.hf import tensors_of_file
from aurora_train.interop.proof import NAME as PROOF
from aurora_train.interop.result import AS_IT_IS, origin_of, published
from aurora_train.interop.source import same_bits
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.run import Run
from aurora_train.train.evaluate import weights_of
from aurora_train.train.session import recipe_of
from aurora_train.train.starting import read_whole

PROBE = "probe.safetensors"
EXAMPLES = 16  # of the batch that is compared
# Difference of predictions that another machine may make, relative to the largest of an array. Arrays of which nothing
# is larger than TINY are compared as if something were.
BOUND, TINY = 1e-3, 1e-6
_KEPT = ("scores.json", "facts", "code")  # what is copied as it is
# What is not part of the proof.
_CHANGING = ("events.jsonl", CARD, PROOF, "provenance.json", "lineage.jsonl", "model.sig")


def refuse_format(run: Run, format: str, known: tuple[str, ...]) -> None:
    """UserError for a format that neither we nor the run's recipe know. Reads no weights."""
    config = load_resolved(run.folder)
    formats = config.recipe_class.formats
    if format not in formats:
        there = [*formats, *(known if isinstance(getattr(config, "model", None), DecoderConfig) else ())]
        raise UserError(f"a run of {config.recipe} has no format {format!r}", where="--format",
                        hint=f"one of {', '.join(there)}" if there else AS_IT_IS)  # fmt: skip


def write(trained, folder: Path, format: str) -> dict[str, Any]:
    """Write a loaded run into an empty folder, without its proof. Returns the compared batch and the run's predictions,
    by name."""
    from safetensors.numpy import save

    run, recipe = Run(trained.run), trained.recipe
    for name in _KEPT:
        source = run.folder / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copyfile(source, folder / name)
    (folder / "config.yaml").write_text(dump_without_folders(trained.config), encoding="utf-8")
    # Not `save_file`, whose files only their owner can read.
    made = Run(folder)
    made.weights.write_bytes(save(_flat(trained.state), {"format": "np"}))
    with recipe_code(recipe, "probe"):
        batch = recipe.probe(EXAMPLES)
    compared = _named("input", batch) | _named("output", trained.predict(batch))
    (folder / PROBE).write_bytes(save(compared, {"format": "np"}))
    known = trained.provenance
    write_json(folder / "provenance.json", {
        "format": format, "step": trained.step, "origin": _origin(trained),
        "recipe": known.get("recipe", {}), "code_sha256": known.get("code_sha256"), "versions": known.get("versions"),
        "facts_sha256": kept_facts.sha256(recipe.known), "weights_sha256": _sha256(made.weights),
        "limits_overridden": known.get("limits_overridden", []),
    })  # fmt: skip
    return compared


def read(config, run: Run, step: int | None, progress):
    """(recipe, blueprint, mesh, state, step) of an export, as `train.session.open_for_reading` of a run."""
    known = read_json(run.provenance) or {}
    if step not in (None, known.get("step")):
        raise UserError(f"this export is of step {known.get('step')}", where="--step", hint="leave --step out")
    if _sha256(run.weights) != known.get("weights_sha256"):
        raise UserError("these weights are not those that were exported", where=str(run.weights),
                        hint="export the run again, or restore the file from a copy")  # fmt: skip
    recipe = recipe_of(config, run, progress)
    if kept_facts.sha256(recipe.known) != known.get("facts_sha256"):
        raise UserError("these facts are not those that were exported", where=str(run.facts),
                        hint="export the run again, or restore the folder from a copy")  # fmt: skip
    blueprint, mesh = read_whole(config, recipe)
    tree, places = _tree(blueprint.state), _tree(blueprint.shardings)
    tensors = tensors_of_file(run.weights)
    wanted = {name: jax.ShapeDtypeStruct(spec.shape, tensors[name].dtype if name in tensors else spec.dtype)
              for name, spec in layout.abstract(tree, places).items()}  # fmt: skip
    stored = {name: jax.ShapeDtypeStruct(one.shape, one.dtype) for name, one in tensors.items()}
    layout.refuse_difference(stored, wanted, where=str(run.weights))
    # In the dtypes of the file: those of a moving average are wider than a model's own.
    tree = jax.tree.unflatten(jax.tree.structure(tree), [
        jax.ShapeDtypeStruct(leaf.shape, tensors[names[0]].dtype) for names, _, leaf in layout.entries(tree)
    ])  # fmt: skip
    filled = layout.assemble({name: one.whole() for name, one in tensors.items()}, tree, places)
    state = blueprint.state._replace(**filled, opt_state={}, extra={})
    return recipe, blueprint, mesh, state, known.get("step")


def prove(compared: dict[str, np.ndarray], predict: Callable[[dict], Any], folder: Path) -> dict[str, Any]:
    """Compare the predictions of an export that was read back with those of its run; write proof.json and return it.

    UserError unless they are equal to the bit.
    """
    found = _predicted(compared, predict)
    if not found or found.keys() != _outputs(compared).keys():
        raise UserError("read back, the export predicts nothing that can be compared", where=str(folder),
                        hint="`predict` has to return an array, or arrays by name")  # fmt: skip
    for name, array in found.items():
        if not same_bits(array, compared[name]):
            raise UserError(f"read back, the export predicts another `{name}`", where=str(folder),
                            hint="this is a mistake in aurora_train: please report it")  # fmt: skip
    says = f"read back, it makes the run's predictions of {EXAMPLES} examples, to the bit"
    proof = {"kind": "round trip", "format": read_json(folder / "provenance.json")["format"], "says": says,
             "files": digests(folder)}  # fmt: skip
    write_json(folder / PROOF, proof)
    return proof


def repeat(folder: Path, load: Callable[[Path], Any]) -> dict[str, Any]:
    """Repeat the proof of an export from its folder alone. Returns {"faults": [line], "proof": ...}."""
    proof = read_json(folder / PROOF) or {}
    if not isinstance(proof.get("files"), dict):
        raise UserError(f"this folder has no usable {PROOF}", where=str(folder), hint="export the run again")
    now = digests(folder)
    faults = [f"{name} was changed or is missing" for name, digest in proof["files"].items() if now.get(name) != digest]
    faults += [f"{name} was added after the proof" for name in now if name not in proof["files"]]
    try:
        compared = {name: tensor.whole() for name, tensor in tensors_of_file(folder / PROBE).items()}
        faults += [] if faults else differences(compared, _predicted(compared, load(folder).predict))
    except UserError as fault:
        faults.append(str(fault))
    return {"faults": faults, "proof": proof}


def differences(compared: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> list[str]:
    """A line for each prediction that is not the recorded one."""
    lines = []
    for name, recorded in _outputs(compared).items():
        if name not in found or found[name].shape != recorded.shape:
            lines.append(f"the prediction `{name}` is missing or has another shape")
            continue
        recorded = np.asarray(recorded, np.float64)
        largest = float(np.abs(found[name] - recorded).max(initial=0.0))
        if not largest <= BOUND * max(float(np.abs(recorded).max(initial=0.0)), TINY):
            lines.append(f"the prediction `{name}` differs from the recorded one by up to {largest:.2g}")
    return lines


def about(trained, format: str) -> dict[str, Any]:
    """What the record of an export, and so its card, says of it beside what the run's own lineage has."""
    origin = _origin(trained)
    count = sum(int(np.prod(array.shape)) for array in jax.tree.leaves(trained.state.params))
    own = limits.scored(Run(trained.run), trained.step)  # a score of another step says nothing of these weights
    return {
        "library_name": "aurora_train", "format": format, "what": f"A {format} of {count:,} trained parameters",
        "use": "`aurora act FOLDER` answers requests with it.", "exceeded": limits.exceeded(trained.recipe, own),
        **{name: origin.get(name) for name in ("run", "step", "recipe", "base", "licence")},
    }  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    """sha256 of each file that the proof is about, by its path in the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: _sha256(path) for name, path in names.items() if name not in _CHANGING}


def _origin(trained) -> dict[str, Any]:
    known = trained.provenance
    if "origin" in known:  # an export of an export
        return known["origin"]
    return published(origin_of(SimpleNamespace(run=trained.run, config=trained.config, facts=trained.recipe.known,
                                               provenance=known, step=trained.step)))  # fmt: skip


def _tree(of) -> dict[str, Any]:
    return {"params": of.params, "frozen": of.frozen, "rest": of.rest}


def _flat(state) -> dict[str, np.ndarray]:
    params, rest, frozen = weights_of(state)
    return layout.snapshot({"params": params, "frozen": frozen, "rest": rest})


def _named(place: str, tree) -> dict[str, np.ndarray]:
    """The arrays of a pytree by name: "output", or "input.state"."""
    return {names[0]: np.ascontiguousarray(leaf) for names, _, leaf in layout.entries({place: tree})}


def _predicted(compared: dict[str, np.ndarray], predict: Callable[[dict], Any]) -> dict[str, np.ndarray]:
    batch = {name.removeprefix("input."): one for name, one in compared.items() if name.startswith("input.")}
    return _named("output", predict(batch))


def _outputs(compared: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: one for name, one in compared.items() if not name.startswith("input.")}


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
