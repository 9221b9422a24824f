"""The Python interface of the command line: `load(RUN)` for a trained model, `train(CONFIG)` for use in a notebook."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aurora_train.errors import UserError
from aurora_train.files import read_json
from aurora_train.run import Run, say_changed_code

if TYPE_CHECKING:
    import numpy as np

    from aurora_train.interop.result import OnDisk

_SILENT = lambda done, total, what: None  # noqa: E731 (the default argument of two functions)


@dataclass(repr=False)
class Loaded:
    """A run's model at one step, in evaluation mode. `tokenizer` is None if the recipe has none."""

    run: Path
    config: Any
    recipe: Any
    model: Any
    step: int
    evaluator: Any = field(repr=False)
    state: Any = field(repr=False)

    @property
    def tokenizer(self):
        """The tokenizer that the model was trained with, or None."""
        return getattr(self.recipe, "tokenizer", None)

    @property
    def provenance(self) -> dict:
        """The origin of the run, as provenance.json records it."""
        return read_json(Run(self.run).provenance, {})

    def generate(
        self, prompt: str = "", *, max_tokens: int = 256, temperature: float = 0.8, top_k: int | None = None,
        top_p: float | None = 0.95, seed: int = 0, on_text: Callable[[str], None] = lambda text: None,
    ) -> str:  # fmt: skip
        """The continuation of a prompt, as `aurora generate` prints it. `on_text` is called with each new piece.

        Raises UserError if the recipe cannot generate.
        """
        from aurora_train.nn.tracing import tracing

        options = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        with tracing(forms=self.config.train.forms):
            return self.recipe.generate(self.model, prompt, options, on_text)

    def chat(
        self, messages: list[dict], *, max_tokens: int = 1024, temperature: float = 0.7, top_k: int | None = None,
        top_p: float | None = 0.95, seed: int = 0, template: str | None = None,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> str:  # fmt: skip
        """The answer to a conversation of {"role", "content"} messages, by the model's chat template or by `template`.

        Raises UserError if the model has no template and none is given, and for a conversation that does not fit.
        """
        from aurora_train.nn.tracing import tracing

        options = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
                   "template": template}  # fmt: skip
        with tracing(forms=self.config.train.forms):
            return self.recipe.chat(self.model, messages, options, on_text)

    def logits(self, tokens):
        """Scores of the next token after each position, float32[..., T, vocabulary], of token ids int[..., T].

        Raises UserError if the recipe's model has no vocabulary.
        """
        return self.recipe.logits(self.model, tokens)

    def predict(self, batch: dict):
        """`Recipe.predict` of a batch of numpy arrays, as numpy: the input of the recipe's score."""
        return self.evaluator.predictor(self.state)(batch)

    def __repr__(self) -> str:
        from aurora_train.nn.param import parameter_count

        count = parameter_count(self.state.params) + parameter_count(self.state.frozen)
        return f"<{self.config.recipe} of {self.run.name} at step {self.step}, {count:,} parameters>"


def load(
    run, step: int | None = None, *, recipe=None, by: str = "load", progress=_SILENT, at_once: bool = False
) -> Loaded:
    """The model of a run folder, from its newest checkpoint or that of `step`, with averaged weights if they were kept.

    The training data is not needed. `recipe` is a recipe file to use instead of the run's own; it has to build the same
    model. Code that differs from the code of the training is reported on standard error, and in events.jsonl as read by
    `by`. Raises UserError if there is no such run or checkpoint, or if its bytes differ from those that were saved.

    `run` may also be an open model, a Hugging Face folder or a GGUF file, which has no steps, or an export of a run as
    `tools.exported` writes it. `at_once`: in a process that has not used jax yet, programs for a CPU run on the thread
    that calls them, so that the answer of a small one waits for no other thread to wake up.
    """
    from aurora_train.config import load_resolved
    from aurora_train.interop.source import is_model, located
    from aurora_train.machine.profile import prepare_environment

    run = located(run)
    if is_model(run):
        return _load_source(Path(run), step, recipe)
    known = Run.existing(run)
    config = load_resolved(known.folder, recipe=recipe and Path(recipe))
    say_changed_code(known, config, by)
    prepare_environment(config)
    if at_once:
        import jax

        jax.config.update("jax_cpu_enable_async_dispatch", False)
    from aurora_train.machine.precision import settled
    from aurora_train.tools import exported
    from aurora_train.train.session import open_for_reading

    config = settled(config)  # for a config.yaml that was edited by hand
    read = exported.read if known.is_export() else open_for_reading
    opened, blueprint, mesh, state, step = read(config, known, step, progress)
    from aurora_train.train.evaluate import Evaluator

    evaluator = Evaluator(opened, blueprint, mesh)
    return Loaded(known.folder, config, opened, evaluator.model(state), step, evaluator, state)


def _load_source(source: Path, step: int | None, recipe) -> Loaded:
    """An open model, by the recipe of language models and nothing else."""
    from aurora_train.config import load_values
    from aurora_train.machine.profile import prepare_environment

    if step is not None:
        raise UserError(f"{source.name} is an open model, and has no steps", where="--step", hint="leave --step out")
    if recipe is not None:
        raise UserError(
            f"{source.name} is an open model, which only the recipe language_model reads", where="--recipe",
            hint=f"aurora import {source} --to RUN makes a run of it, which may be read by another recipe",
        )  # fmt: skip
    config = load_values(_started_from(source), source.name)
    prepare_environment(config)
    from aurora_train.machine.precision import settled
    from aurora_train.train.evaluate import Evaluator
    from aurora_train.train.session import open_start_for_reading

    config = settled(config)
    recipe, blueprint, mesh, state = open_start_for_reading(config)
    evaluator = Evaluator(recipe, blueprint, mesh)
    return Loaded(source, config, recipe, evaluator.model(state), 0, evaluator, state)


def _started_from(source: Path) -> dict:
    return {"recipe": "language_model", "model": {"from": str(source.absolute())}}


@contextlib.contextmanager
def unread(run, step: int | None = None, *, by: str, progress=_SILENT) -> Iterator[OnDisk]:
    """A run or an open model as `load` takes it, whose parameters stay on disk and are read one layer at a time.

    Raises UserError as `load` does.
    """
    from aurora_train.config import load_resolved, load_values
    from aurora_train.interop.source import is_model, located
    from aurora_train.machine.profile import prepare_environment

    run = located(run)
    source = Path(run) if is_model(run) else None
    known = Run(run) if source else Run.existing(run)
    if source and step is not None:
        raise UserError(f"{source.name} is an open model, and has no steps", where="--step", hint="leave --step out")
    config = load_values(_started_from(source), source.name) if source else load_resolved(known.folder)
    if source is None:
        say_changed_code(known, config, by)
    prepare_environment(config)
    from aurora_train.machine.precision import settled

    config = settled(config)
    if source:
        yield _unread_source(source, config)
        return
    from aurora_train.checkpoint.reading import opened
    from aurora_train.checkpoint.store import CheckpointStore
    from aurora_train.interop.result import OnDisk
    from aurora_train.train.session import recipe_of, refuse_facts_of_another

    recipe = recipe_of(config, known, progress)
    facts = recipe.known
    with contextlib.closing(CheckpointStore(known.checkpoints, known.trash)) as store:

        def begun(step: int):
            refuse_facts_of_another(store, step, facts)
            return _by_layer(store, step)

        step, (specs, read) = opened(store, step, str(known.folder), begun)
        origin, mask = read_json(known.provenance, {}), _mask(recipe, config.train.seed)
        yield OnDisk(known.folder, config, facts, origin, step, specs, read, mask)


def _mask(recipe, seed: int) -> str:
    """The mask of a recipe's model, which only the built model knows; nothing of it is computed."""
    from flax import nnx

    from aurora_train.nn import carried

    return getattr(nnx.eval_shape(lambda: carried.build(recipe, seed)), "mask", "causal")


def _unread_source(source: Path, config) -> OnDisk:
    import jax

    from aurora_train.interop.kept import facts_of
    from aurora_train.interop.placing import matched
    from aurora_train.interop.result import OnDisk
    from aurora_train.interop.source import as_parent, open_source

    opened = matched(open_source(source))
    facts = facts_of(opened.source, opened.family.model_type, opened.beside)
    specs = {name: jax.ShapeDtypeStruct(shape, opened.dtype(name)) for name, shape in opened.shapes.items()}
    return OnDisk(source, config, facts, {"parent": as_parent(source)}, 0, specs, opened.read)


_GIVE_BACK_BYTES = 1 << 28
_LAYER = re.compile(r"stack\.units\.\d+\.(blocks\.\d+\.)?")


def _by_layer(store, step: int) -> tuple[dict, Callable[[str], np.ndarray]]:
    """(specs by bare name, reader of one parameter): the parameters of a layer are read together, and held until those
    of another are asked for, because opening a checkpoint takes longer than reading a small array."""
    import jax
    import numpy as np

    from aurora_train import mesh as meshes
    from aurora_train.checkpoint.reading import reading
    from aurora_train.machine.memory import give_back_freed
    from aurora_train.origin.weights import stored_parameters

    stored, read_some = stored_parameters(store, step)
    place = jax.sharding.NamedSharding(meshes.make_mesh(1, 1), jax.sharding.PartitionSpec())
    specs = {name: jax.ShapeDtypeStruct(tuple(one.shape), one.dtype, sharding=place) for name, one in stored.items()}
    groups: dict[str, list[str]] = {}
    for name in specs:
        groups.setdefault(_layer_of(name), []).append(name)
    held: dict[str, Any] = {}
    released = 0  # bytes since the allocator last gave them back, which it does not do by itself

    def read(name: str) -> np.ndarray:
        nonlocal released
        if name not in held:
            released += sum(array.nbytes for array in held.values())
            held.clear()
            if released > _GIVE_BACK_BYTES:
                give_back_freed()
                released = 0
            with reading(store, step):
                held.update(read_some({one: specs[one] for one in groups[_layer_of(name)]}))
        return np.asarray(held[name])

    return specs, read


def _layer_of(name: str) -> str:
    found = _LAYER.match(name)
    return found[0] if found else name


def train(
    config, overrides: Iterable[str] = (), *, run=None, fresh: bool = False, quiet: bool = False
) -> Loaded:
    """Train a config to its end, or continue a run of it, as `aurora train` does. Returns the trained model.

    Args:
        config: a YAML file, or the name of a bundled config.
        overrides: `key.path=value` strings, laid over it.
        run: the run's folder; by default `runs/NAME-HASH`.
        fresh: move an existing run aside and start over.

    An interrupt saves and stops; the model of the last step is returned, and the same call continues the run. Raises
    UserError for whatever the command line would refuse, and if the run was stopped before a step was saved.
    """
    from aurora_train.check.intent import for_train
    from aurora_train.config import load as load_config
    from aurora_train.machine.profile import prepare_environment

    if isinstance(overrides, str | dict):
        raise UserError("overrides must be a list of strings", hint='["train.steps=100", "optimizer.lr=1e-3"]')
    resolved = load_config(config, overrides)
    folder = for_train(resolved, run, fresh=fresh)
    if folder.finished_at(resolved) is None:
        prepare_environment(resolved)
        from aurora_train.tools.report import report_ending
        from aurora_train.train.start import train as take_to_its_end

        report_ending(take_to_its_end(resolved, folder, quiet=quiet))
    return load(folder.folder)
