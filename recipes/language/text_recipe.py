"""What the recipes that read text share: the tokenizer of a run and the checks of a model that reads whole rows.

`Writer` adds what those share whose model continues texts: the decoder and its loss, samples for the report,
generation, and logits.
"""

from __future__ import annotations

import functools
from datetime import datetime

import numpy as np

from aurora_train.config import Section, setting
from aurora_train.errors import UserError
from aurora_train.facts import DATE
from aurora_train.interop.kept import TEMPLATE
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.recipe import Derived, Loss, Recipe
from aurora_train.tools.sizes import derive_from_size
from language.starting import derive_from_source


class Samples(Section):
    """The samples generated for the report after training."""

    count: int = setting(8, resume="free", ge=0, help="number of samples")
    max_tokens: int = setting(256, resume="free", ge=1, help="tokens per sample")
    temperature: float = setting(0.8, resume="free", ge=0, help="0 takes the likeliest token")
    top_p: float | None = setting(0.95, resume="free", gt=0, le=1, help="nucleus of the distribution")
    prompts: list[str] = setting([], resume="free", help="texts to continue, in turn; none: from nothing")


def refuse_no_test(config) -> None:
    """UserError if a run is to be scored and nothing is held out for it."""
    if config.evaluate.final and config.data.holdout_test == 0:
        raise UserError(
            "there is nothing held out on which to score the run", where="data.holdout_test",
            hint="set data.holdout_test=0.02 or evaluate.final=false",
        )  # fmt: skip


class TextRecipe(Recipe):
    """Has the config sections `model`, a `DecoderConfig`, and `data` with a `tokenizer` and a `sequence`."""

    @classmethod
    def check(cls, config) -> None:
        model, sequence = config.model, config.data.sequence
        if model.positions == "learned" and model.max_length < sequence:
            raise UserError(
                f"rows of {sequence} tokens need as many learned positions", where="model.max_length",
                hint=f"model.max_length={sequence}, or model.positions=rope",
            )  # fmt: skip
        if any(row.kind == "cross" for row in model.rows):
            raise UserError(
                "the model has no encoder that a layer of kind cross could read", where="model.layer_table",
                hint="use kind: full; an encoder beside a decoder needs your own recipe: docs/extend.md",
            )  # fmt: skip

    def expected_facts(self) -> dict | None:
        """The vocabulary's expected size; a small text may give fewer entries than the config asks for."""
        from language.tokenizers import expected_vocabulary

        return {"vocabulary": expected_vocabulary(self.config.data.tokenizer)}

    @functools.cached_property
    def tokenizer(self):
        """The tokenizer of the training text, on any machine."""
        from language.tokenizers import Tokenizer

        return Tokenizer.of_files(self.known)

    @property
    def inherited_tokenizer(self):
        """The tokenizer of this run so far, or of the run from which it starts; None if there is none."""
        from language.tokenizers import FILE, Tokenizer

        return Tokenizer.of_files(self.inherited) if FILE in self.inherited else None

    def scoring(self, **data) -> TextRecipe:
        """A recipe with this one's facts and other settings of `data`, for `on`."""
        config = self.config.model_copy(update={"data": self.config.data.model_copy(update=data)})
        other = type(self)(config, self.cache)
        other.inherited, other.start = self.known, self.start
        return other.use(self.known)


class Writer(TextRecipe):
    """A recipe whose model is a `Decoder` over the tokenizer's vocabulary, with the config section `samples`.

    Its batches are `tokens`, `targets`, `segments`, `positions` int32[B, T] and `weights` float32[B, T].
    """

    dials = ("model.size",)
    _kept: tuple = ([], None)  # the arrays of the model that was last asked, and its generator

    @classmethod
    def derive(cls, given: dict) -> list[Derived]:
        """The shape of a size or of a source, and what follows from learned positions."""
        model, data = given.get("model") or {}, given.get("data") or {}
        tokenizer, size, derived = data.get("tokenizer") or {}, model.get("size"), []
        if isinstance(model.get("from"), str):
            derived = derive_from_source(given)
        elif isinstance(size, str):
            vocab = tokenizer.get("vocab", 4096) if tokenizer.get("kind", "auto") not in ("auto", "byte") else 257
            derived = derive_from_size(size, given, vocab, data.get("sequence", cls.Config().data.sequence))
        model = model | {one.key.removeprefix("model."): one.value for one in derived}
        table = model.get("max_length", DecoderConfig().max_length)
        if model.get("positions") == "learned" and isinstance(table, int) and 1 < table <= Samples().max_tokens:
            formula = f"{table} learned positions, less one for the first token"
            derived.append(Derived("samples.max_tokens", table - 1, formula, "model.positions: learned"))
        return derived

    @classmethod
    def check(cls, config) -> None:
        super().check(config)
        room, samples = config.model.max_length - 1, config.samples
        if config.model.positions == "learned" and samples.count and samples.max_tokens > room:
            raise UserError(
                f"samples of {samples.max_tokens} tokens do not fit into {room + 1} learned positions, the first of "
                "which is taken by the separator",
                where="samples.max_tokens",
                hint=f"samples.max_tokens={room}, model.max_length={samples.max_tokens + 1}, or model.positions=rope",
            )

    def shapes(self) -> dict:
        import jax

        row = (self.config.data.sequence,)
        arrays = {name: jax.ShapeDtypeStruct(row, "int32") for name in ("tokens", "targets", "segments", "positions")}
        return arrays | {"weights": jax.ShapeDtypeStruct(row, "float32")}

    def facts_with(self, tokenizer) -> dict:
        """A tokenizer, the rows of the embedding, and what a model that this one starts from brought with it."""
        vocabulary = max(tokenizer.vocab_size, self.inherited.get("vocabulary", 0))
        date = {DATE: datetime.now().isoformat(timespec="seconds")} if TEMPLATE in self.inherited else {}
        return {**date, **self.inherited, **tokenizer.facts(), "vocabulary": vocabulary}

    def model(self, rngs):
        from aurora_train.nn.decoder import Decoder

        return Decoder(self.config.model, self.known["vocabulary"], self.config.train.dtype, rngs)

    def loss(self, model, batch: dict, key) -> Loss:
        return Loss(*model.nll(self.read(model, batch, key), batch["targets"], batch["weights"]))

    def predict(self, model, batch: dict):
        """-log p of each target in nats, float32[B, T]."""
        return model.token_nll(self.read(model, batch), batch["targets"])

    def read(self, model, batch: dict, key=None):
        """The model's hidden states of a batch."""
        return model(batch["tokens"], batch["segments"], batch["positions"], key)

    def flops_per_target(self, num_parameters: int) -> float:
        """6 N for the matrices and 6 L T D for causal attention, each pair counted once (Chowdhery et al. 2022, B).

        What a linear layer does with its state is not counted: its share is small beside its matrices.
        """
        model, sequence = self.config.model, self.config.data.sequence
        spans = [0 if row.kind == "linear" else min(sequence, row.window or sequence) for row in model.rows]
        pairs = 6.0 * model.layers * sum(spans) / len(spans) * model.heads * model.dim_per_head
        return 6.0 * (num_parameters - self.looked_up() - self._adapter_looked_up()) + pairs

    def looked_up(self) -> int:
        model = self.config.model
        return 0 if model.tied else self.known["vocabulary"] * model.width

    def _adapter_looked_up(self) -> int:
        """Of an embedding's adapter, the matrix whose rows are looked up; in a tied model it is multiplied as well."""
        model = self.config.model
        adapted = model.lora is not None and not model.tied and model.lora.adapts("", "embedding")
        return self.known["vocabulary"] * model.lora.rank if adapted else 0

    def writes(self) -> tuple[int, int] | None:
        wanted = self.config.samples
        longest = max((1 + len(prompt.encode()) for prompt in wanted.prompts), default=1)  # a token is a byte or more
        return (wanted.count, longest + wanted.max_tokens) if wanted.count else None

    def samples(self, model, key) -> list[dict]:
        """Continuations of what `begun` gives, each with what `judged` says of it."""
        import jax

        from language.tokenizers import Continuation

        wanted = self.config.samples
        begun = [(prompt, Continuation(self.tokenizer, start), facts) for prompt, start, facts in self.begun()]
        if not begun:
            return []
        generator, seed = self._generator(model), int(jax.random.bits(key, dtype="uint32") >> 1)
        starts, length = generator.fitted([one.start for _, one, _ in begun], wanted.max_tokens)
        outputs = generator.generate_batch(starts, length, wanted.temperature, None, wanted.top_p, seed)
        for (_, one, _), ids in zip(begun, outputs, strict=True):
            one.add(ids)
        return [
            {"prompt": prompt, "text": one.text, **facts, **self.judged(prompt + one.text)}
            for prompt, one, facts in begun
        ]

    def begun(self) -> list[tuple[str, str | list[int], dict]]:
        """What the samples continue: (the prompt as shown, it as a text or as ids, facts about it for the report)."""
        wanted = self.config.samples
        prompts = [(wanted.prompts or [""])[i % max(len(wanted.prompts), 1)] for i in range(wanted.count)]
        return [(prompt, prompt, {}) for prompt in prompts]

    def judged(self, text: str) -> dict:
        """Facts about a sample with its prompt, for the report."""
        return {}

    def generate(self, model, prompt: str, options: dict, on_text) -> str:
        from language.tokenizers import Continuation

        written = Continuation(self.tokenizer, prompt)
        self._answering(model, self._ends()).generate(
            written.start, options["max_tokens"], options["temperature"], options["top_k"], options["top_p"],
            options["seed"], lambda token: on_text(written.add([token])),
        )
        return written.text

    def chat(self, model, messages: list[dict], options: dict, on_text) -> str:
        from language.chat import Dialogue

        dialogue = Dialogue(self.tokenizer, self.known, options.get("template"))
        return dialogue.answer(self._answering(model, dialogue.ends()), messages, options, on_text)

    def speaker(self, template: str | None = None):
        from language.speaking import TextSpeaker

        return TextSpeaker(self.tokenizer, self.known, template)

    def logits(self, model, tokens):
        import jax.numpy as jnp

        tokens = np.asarray(tokens, np.int64)
        if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= self.known["vocabulary"]:
            raise UserError(f"token ids are 0 to {self.known['vocabulary'] - 1}, and at least one", where="tokens")
        rows = jnp.atleast_2d(jnp.asarray(tokens, jnp.int32))
        logits = model.logits(model(rows))
        return logits.reshape(*jnp.shape(tokens), -1)

    def _ends(self) -> set[int]:
        """The ids that end a text."""
        return {self.tokenizer.eos_id, *(self.known.get("origin") or {}).get("eos_ids", ())}

    def _generator(self, model):
        from aurora_train.generate.sampler import Generator

        return Generator(model, self._ends())

    def _answering(self, model, ends):
        """The generator of a model that is asked again and again, which holds a copy of its weights."""
        import jax
        from flax import nnx

        arrays = jax.tree.leaves(nnx.state(model))
        if [*map(id, arrays)] != [*map(id, self._kept[0])]:
            self._kept = ([], None)  # the old copy goes first
            self._kept = (arrays, self._generator(model))
        self._kept[1].ends = frozenset(ends)
        return self._kept[1]
