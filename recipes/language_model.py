"""Language modelling: a decoder transformer trained on text, scored in bits per byte on whole held-out documents.

Bits per byte do not depend on the tokenizer, so runs with different vocabularies are comparable, and so are file
compressors: the score is shown beside those of `xz`, `gzip` and an n-gram model on the same documents.
"""

from __future__ import annotations

import numpy as np

from aurora_train.config import Section, setting
from aurora_train.errors import UserError
from aurora_train.interop.kept import ORIGIN, TEMPLATE
from aurora_train.recipe import Loss, few
from aurora_train.units import size
from language import conversations
from language.corpus import check_data
from language.settings import ALL_HELD_OUT, TextDataConfig, TokenizerConfig
from language.starting import CopyingConfig
from language.text_recipe import Samples, Writer, refuse_no_test


class Scoring(Section):
    """How the held-out documents are read: windows of the training length, each token scored once."""

    overlap: float = setting(0.5, resume="free", ge=0, lt=1, help="share of a window that is context seen before")
    batch: int = setting(32, resume="free", ge=1, help="windows at a time")


class Config(Section):
    model: CopyingConfig = setting(CopyingConfig())
    data: TextDataConfig = setting(TextDataConfig())
    score: Scoring = setting(Scoring())
    samples: Samples = setting(Samples())


class Recipe(Writer):
    """One decoder, next-token cross-entropy, bits per byte. With `model.copying`, batches also have `matches`."""

    Config = Config
    unit, metric = "tok", ("bits_per_byte", "min")

    @classmethod
    def check(cls, config) -> None:
        check_data(config.data)
        refuse_no_test(config)
        super().check(config)

    store = matches = None  # the prepared data, once there are any

    def facts(self) -> dict:
        return self.facts_with(self.store.tokenizer)

    def prepare(self, progress) -> None:
        from language.prepare import prepare

        inherited = self.inherited_tokenizer
        self.store = prepare(self.config.data, self.cache / "data", progress=progress, inherited=inherited)
        if self.copying:
            from language.matches import prepare_matches

            self.matches = prepare_matches(self.store, self.copying, self.cache / "data", progress)

    @property
    def copying(self) -> tuple[int, ...]:
        return self.config.model.copying

    def shapes(self) -> dict:
        import jax

        shape = (self.config.data.sequence, len(self.copying), 3)
        return super().shapes() | ({"matches": jax.ShapeDtypeStruct(shape, "int32")} if self.copying else {})

    def model(self, rngs):
        if not self.copying:
            return super().model(rngs)
        from language.copying import CopyingDecoder

        return CopyingDecoder(self.config.model, self.known["vocabulary"], self.config.train.dtype, rngs)

    def read(self, model, batch: dict, key=None):
        beside = {"matches": batch["matches"]} if self.copying else {}
        return model(batch["tokens"], batch["segments"], batch["positions"], key, **beside)

    def loss(self, model, batch: dict, key) -> Loss:
        if not self.copying or key is None:  # an evaluation's loss is that of the score
            return super().loss(model, batch, key)
        return Loss(*model.objective(self.read(model, batch, key), batch["targets"], batch["weights"]))

    def on(self, path: str):
        """A recipe whose test split is a whole source, tokenized like the training text. Conversations are scored as
        `language/tune` does, if the model has a template."""
        if TEMPLATE in self.known and not self.copying and conversations.are_in(path):
            return self._tuning().on(path)
        return self.scoring(
            source=path, mix={}, pattern="**/*", max_documents=None, tokenizer=TokenizerConfig(),
            holdout_test=ALL_HELD_OUT, holdout_validation=0.0,
        )  # fmt: skip

    def _tuning(self):
        """The same model under `language/tune`; conversations longer than its default row are left out and counted."""
        from language.tune import DataConfig, Scoring, Tune

        default, room = DataConfig().sequence, (self.known.get(ORIGIN) or {}).get("max_length")
        sequence = max(self.config.data.sequence, min(default, room or default))
        data = DataConfig(sequence=sequence, overlong="leave_out")
        return Tune(self.config.model_copy(update={"data": data, "score": Scoring()}), self.cache).use(self.known)

    def data(self, split: str):
        from language.rows import TokenSource

        if split == "validation" and self.config.data.holdout_validation == 0:
            return None
        mix = self.config.data.mix if split == "train" else {}
        weights = {name: part.weight for name, part in mix.items()} or None
        return TokenSource(self.store, split, self.config.data.sequence, weights, self.matches)

    def texts(self):
        for number, name in enumerate(self.store.names("train")):
            yield name, self.store.text("train", number).decode(errors="replace")

    def score(self, predict, split, key, workdir, progress) -> dict:
        from language.windows import bits_per_document, windows

        documents = list(self.store.documents(split))
        if not documents:
            raise UserError("the test split has no document", where="data.holdout_test", hint="data.holdout_test=0.02")
        sequence = self.config.data.sequence
        overlap = int(sequence * self.config.score.overlap)
        beside = {"matches": self.matches.documents(split)} if self.copying else {}
        batches = windows([d.tokens for d in documents], sequence, overlap, self.config.score.batch, beside)

        def scored():
            for number, batch in enumerate(batches):
                progress(number, len(batches), "scoring held-out documents")
                inputs = {name: array for name, array in batch.items() if name != "document"}
                yield batch, predict(inputs)
            progress(len(batches), len(batches), "scoring held-out documents")

        bits = bits_per_document(scored(), len(documents))
        sizes = np.array([d.num_bytes for d in documents], np.float64)
        np.save(workdir / "bits.npy", bits)
        tokens = sum(len(d.tokens) - 1 for d in documents)
        more = "more text" if self.config.data.holdout_test == ALL_HELD_OUT else "raise data.holdout_test"
        return {
            "bits_per_byte": float(bits.sum() / sizes.sum()),
            **self._by_source([document.name for document in documents], bits, sizes),
            "documents": len(documents),
            "bytes": int(sizes.sum()),
            "bytes_per_token": float(sizes.sum() / tokens),
            "remarks": few(len(documents), "document", more, size(sizes.sum())),
            "notes": [
                f"{len(documents)} {self.store.held_out}; windows of {sequence} tokens, "
                f"{overlap} of them context seen before; each document is read from its start without other context",
                *(["the model may copy from the whole document so far, of which a window shows the end"]
                  if self.copying else []),
            ],
        }

    def _by_source(self, names: list[str], bits, sizes) -> dict[str, float]:
        """Bits per byte of each source of a mixture that has held-out documents."""
        of = np.array([name.partition("/")[0] for name in names])
        return {
            f"bits_per_byte_{name}": float(bits[of == name].sum() / sizes[of == name].sum())
            for name in self.config.data.mix if (of == name).any()
        }  # fmt: skip

    def baselines(self, workdir, progress) -> dict:
        from language.baselines import baselines

        test, train = ([self.store.text(split, i) for i in range(self.store.num_documents(split))]
                       for split in ("test", "train"))  # fmt: skip
        tokens = *([one.tokens for one in self.store.documents(split)] for split in ("train", "test")),
        tokens += (self.store.tokenizer.vocab_size,)
        return baselines(np.load(workdir / "bits.npy"), self.store.names("test"), test, train, tokens, progress)

    def judged(self, text: str) -> dict:
        """Whether a sample of a model of Python is Python."""
        from language.rivals import python_parse_share

        is_python = self.config.data.source == "python-stdlib" or self.config.data.pattern.endswith(".py")
        return {"parses_as_python": bool(python_parse_share([text]))} if is_python else {}
