"""What the recipes that read text share: the tokenizer of a run and the checks of a model that reads whole rows.

`Writer` adds what those share whose model continues texts: samples for the report, generation, and logits.
"""

from __future__ import annotations

import functools

import numpy as np

from aurora_train.config import Section, setting
from aurora_train.errors import UserError
from aurora_train.recipe import Recipe


class Samples(Section):
    """The samples generated for the report after training."""

    count: int = setting(8, resume="free", ge=0, help="number of samples")
    max_tokens: int = setting(256, resume="free", ge=1, help="tokens per sample")
    temperature: float = setting(0.8, resume="free", ge=0, help="0 takes the likeliest token")
    top_p: float | None = setting(0.95, resume="free", gt=0, le=1, help="nucleus of the distribution")
    prompts: list[str] = setting([], resume="free", help="texts to continue, in turn; none: from nothing")


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
        other.inherited = self.known
        return other.use(self.known)


class Writer(TextRecipe):
    """A recipe whose `model` is a `Decoder` over the tokenizer's vocabulary, with the config section `samples`."""

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

    def samples(self, model, key) -> list[dict]:
        """Continuations of `samples.prompts`, each with what `judged` says of it."""
        import jax

        from language.tokenizers import Continuation

        wanted = self.config.samples
        prompts = [(wanted.prompts or [""])[i % max(len(wanted.prompts), 1)] for i in range(wanted.count)]
        if not prompts:
            return []
        begun = [Continuation(self.tokenizer, prompt) for prompt in prompts]
        generator, seed = self._generator(model), int(jax.random.bits(key, dtype="uint32") >> 1)
        starts, length = generator.fitted([one.start for one in begun], wanted.max_tokens)
        outputs = generator.generate_batch(starts, length, wanted.temperature, None, wanted.top_p, seed)
        for one, ids in zip(begun, outputs, strict=True):
            one.add(ids)
        return [
            {"prompt": prompt, "text": one.text, **self.judged(prompt + one.text)}
            for prompt, one in zip(prompts, begun, strict=True)
        ]

    def judged(self, text: str) -> dict:
        """Facts about a sample with its prompt, for the report."""
        return {}

    def generate(self, model, prompt: str, options: dict, on_text) -> str:
        from language.tokenizers import Continuation

        written = Continuation(self.tokenizer, prompt)
        self._generator(model).generate(
            written.start, options["max_tokens"], options["temperature"], options["top_k"], options["top_p"],
            options["seed"], lambda token: on_text(written.add([token])),
        )
        return written.text

    def chat(self, model, messages: list[dict], options: dict, on_text) -> str:
        from language.chat import Dialogue

        dialogue = Dialogue(self.tokenizer, self.known, options.get("template"))
        return dialogue.answer(model, messages, options, on_text)

    def logits(self, model, tokens):
        import jax.numpy as jnp

        tokens = np.asarray(tokens, np.int64)
        if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= self.known["vocabulary"]:
            raise UserError(f"token ids are 0 to {self.known['vocabulary'] - 1}, and at least one", where="tokens")
        rows = jnp.atleast_2d(jnp.asarray(tokens, jnp.int32))
        logits = model.logits(model(rows))
        return logits.reshape(*jnp.shape(tokens), -1)

    def _generator(self, model):
        from aurora_train.generate.sampler import Generator

        return Generator(model, {self.tokenizer.eos_id, *(self.known.get("origin") or {}).get("eos_ids", ())})
