"""Text classification with a bidirectional encoder; scored by accuracy, macro F1 and a confusion table.

The texts and labels are two columns of a table (CSV, Parquet, Arrow, JSON lines). The same share of every class is held
out. The bundled task is available on every machine: to assign functions of the interpreter's own library to their
packages, with naive Bayes on the same words as baseline.
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np

from aurora_train.config import Section, setting
from aurora_train.errors import UserError
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.recipe import Loss, few
from language import labelled
from language.labelled import STDLIB, Texts
from language.settings import TokenizerConfig
from language.text_recipe import TextRecipe

SHOWN_MISTAKES, SHOWN_CHARACTERS = 20, 100


class DataConfig(Section):
    """The table, and how its rows are used."""

    source: str = setting(STDLIB, resume="located", path_unless=(STDLIB,),
                          help="python-stdlib, or a table, a folder or a glob of tables")  # fmt: skip
    text_field: str = setting("text", help="column that holds the text")
    label_field: str = setting("label", help="column that holds its class")
    labels: list[str] = setting([], help="the permitted classes; none: those that occur")
    damaged: Literal["refuse", "leave_out"] = setting(
        "refuse", resume="free", help="rows that cannot be read, such as a line of a CSV with too few fields"
    )
    tokenizer: TokenizerConfig = setting(TokenizerConfig())
    sequence: int = setting(128, ge=2, help="tokens of a text that are read; a longer text is cut off")
    test: float = setting(0.2, gt=0, lt=0.5, help="share of the rows of each class held out for the score")
    validation: float = setting(0.1, gt=0, lt=0.5, help="the same for evaluation while training")


class Config(Section):
    model: DecoderConfig = setting(DecoderConfig())
    data: DataConfig = setting(DataConfig())


class Classify(TextRecipe):
    Config = Config
    unit, metric = "texts", ("accuracy", "max")
    is_test_alone = False  # set by `on`: all rows are in the test split

    @classmethod
    def check(cls, config) -> None:
        if config.data.source != STDLIB:
            labelled.check_columns(_table(config.data))
        if len(set(config.data.labels)) < len(config.data.labels):
            raise UserError("a class is named twice", where="data.labels", hint="name each class once")
        if config.model.lora is not None and "head" in config.model.lora.targets:
            raise UserError("the head of a classifier begins at random and is trained as a whole",
                            where="model.lora.targets", hint="leave head out")  # fmt: skip
        super().check(config)

    def shapes(self) -> dict:
        import jax

        row = jax.ShapeDtypeStruct((self.config.data.sequence,), "int32")
        return {"tokens": row, "segments": row, "label": jax.ShapeDtypeStruct((), "int32")}

    def expected_facts(self) -> dict | None:
        """The labels, too, if they are known before the table is read."""
        labels = self.config.data.labels or self.inherited.get("labels")
        return {**super().expected_facts(), "labels": labels} if labels else None

    def prepare(self, progress) -> None:
        from language.tokenizers import known_tokenizer, train_bpe

        data = self.config.data
        progress(0, 2, "reading texts and labels")
        if self.is_test_alone:
            self.rows, self.left_out = labelled.read(_table(data), self.known["labels"], one_will_do=True)
            self.split = {"train": [], "validation": [], "test": list(range(len(self.rows)))}
            return
        # A run that starts from another may keep its classes, although its own table lacks some of them.
        needed = [] if data.labels == self.inherited.get("labels") else data.labels
        self.rows, self.left_out = labelled.read(_table(data), data.labels, needed=needed)
        self.split = labelled.split(self.rows, data.test, data.validation)
        progress(1, 2, "preparing the tokenizer")
        known = known_tokenizer(data.tokenizer, None, self.inherited_tokenizer)
        training = [self.rows[i].text for i in self.split["train"]]
        self.prepared = known or train_bpe([training], data.tokenizer.vocab, data.tokenizer.split)
        progress(2, 2, f"{len(self.rows):,} texts")

    def facts(self) -> dict:
        labels = self.config.data.labels or sorted({row.label for row in self.rows})
        return {**self.prepared.facts(), "labels": labels}

    def on(self, path: str):
        """A recipe that scores all rows of another table, whose labels must be known to the model."""
        other = self.scoring(source=path)
        other.is_test_alone = True
        return other

    def encode(self, texts: list[str]) -> dict[str, np.ndarray]:
        """A batch of texts as input of `predict`; each begins with the separator."""
        length = self.config.data.sequence
        tokens, segments = (np.zeros((len(texts), length), np.int32) for _ in range(2))
        for row, ids in enumerate(self.tokenizer.encode_batch(texts)):
            ids = [self.tokenizer.eos_id, *ids[: length - 1]]
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        return {"tokens": tokens, "segments": segments}

    def texts(self):
        for number in self.split["train"]:
            yield self.rows[number].place, self.rows[number].text

    @functools.cache  # noqa: B019 - a recipe lives as long as its run
    def data(self, split: str):
        rows = [self.rows[i] for i in self.split[split]]
        arrays = self.encode([row.text for row in rows])
        return Texts(rows, arrays, self.known["labels"], split, self.config.data.source, self.tokenizer)

    def model(self, rngs):
        import jax.numpy as jnp
        from flax import nnx

        from aurora_train.nn import param
        from aurora_train.nn.linear import linear
        from aurora_train.nn.transformer import Transformer

        class Classifier(nnx.Module):
            """tokens, segments int32[B, T] -> class scores float32[B, C], from the mean over the text."""

            def __init__(self, config, vocabulary, classes, dtype, rngs):
                self.encoder = Transformer(config, vocabulary, dtype, rngs, mask="bidirectional")
                self.head = param.kernel(rngs, (config.width, classes), ("embed", "outputs"))
                self.head_bias = param.zeros(classes, "outputs")

            def __call__(self, tokens, segments, keys=None):
                hidden = self.encoder(tokens, segments, keys=keys).astype(jnp.float32)
                text = (segments == 1).astype(jnp.float32)[..., None]
                mean = (hidden * text).sum(1) / text.sum(1)
                return linear(mean, self.head[...], self.head_bias[...])

        known = self.known
        return Classifier(self.config.model, known["vocabulary"], len(known["labels"]), self.config.train.dtype, rngs)

    def trainable(self, path: str) -> bool:
        """What scores the classes begins at random, so it is trained beside adapters, too."""
        return path in ("head", "head_bias") or super().trainable(path)

    def loss(self, model, batch, key) -> Loss:
        """Cross-entropy, summed over the texts."""
        import jax.numpy as jnp
        import optax

        scores, labels = model(batch["tokens"], batch["segments"], key), batch["label"]
        errors = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
        count, right = jnp.float32(len(labels)), (scores.argmax(-1) == labels).sum().astype(jnp.float32)
        return Loss(errors.sum(), count, {"accuracy": (right, count)})

    def predict(self, model, batch):
        """The probability of each class, in the order of the fact `labels`: float32[B, C]."""
        import jax

        return jax.nn.softmax(model(batch["tokens"], batch["segments"]))

    def flops_per_target(self, num_parameters: int) -> float:
        """6 N for each of the tokens, and attention over all pairs (Chowdhery et al. 2022, B)."""
        model, length = self.config.model, self.config.data.sequence
        pairs = 12.0 * model.layers * length * model.heads * model.dim_per_head
        return length * (6.0 * (num_parameters - self.looked_up()) + pairs)

    def looked_up(self) -> int:
        return self.known["vocabulary"] * self.config.model.width

    def score(self, predict, split, key, workdir, progress) -> dict:
        from language import class_scores as scores

        source, labels = self.data(split), self.known["labels"]
        shares, size = [], 64
        for start in range(0, len(source), size):
            progress(start, len(source), "reading held-out texts")
            # The last batch is padded with its last text, so that only one shape is compiled.
            batch = source.take(np.minimum(np.arange(start, start + size), len(source) - 1))
            shares.append(np.asarray(predict({name: batch[name] for name in ("tokens", "segments")})))
        shares, truth = np.concatenate(shares)[: len(source)], source.arrays["label"]
        counts = scores.confusion(truth, shares.argmax(-1), len(labels))
        wrong = np.flatnonzero(shares.argmax(-1) != truth)
        wrong = wrong[np.argsort(-shares[wrong].max(-1), kind="stable")][:SHOWN_MISTAKES]
        texts = source.rows
        mistakes = [[texts[i].place, texts[i].text[:SHOWN_CHARACTERS], labels[truth[i]], labels[shares[i].argmax()],
                     round(float(shares[i].max()), 3)] for i in wrong]  # fmt: skip
        reasons = sorted(self.left_out.items())
        left_out = [f"{number:,} row{'' if number == 1 else 's'} left out: {why}" for why, number in reasons]
        return {
            "accuracy": scores.accuracy(counts),
            "macro_f1": scores.macro_f1(counts),
            "texts": len(source),
            "tables": [
                {"title": "How often each class was taken for which", "columns": ["class", *labels, "F1"],
                 "rows": [[label, *row, round(float(one), 3)]
                          for label, row, one in zip(labels, counts.tolist(), scores.f1(counts), strict=True)]},
                {"title": "The most confident mistakes", "columns": ["where", "text", "is", "read as", "share"],
                 "rows": mistakes},
            ],
            "remarks": few(len(source), "text", "more rows" if self.is_test_alone else "raise data.test"),
            "notes": [f"{len(source):,} held-out texts, the same share of each class; the first "
                      f"{self.config.data.sequence} tokens of each are read", *left_out],
        }  # fmt: skip

    def baselines(self, workdir, progress) -> dict:
        """Accuracy of the commonest class, and of naive Bayes on words."""
        from language.class_scores import naive_bayes

        if not self.split["train"]:
            return {}
        known, truth = (self.data(split).arrays["label"] for split in ("train", "test"))
        texts, others = ([self.rows[i].text for i in self.split[split]] for split in ("train", "test"))
        read = naive_bayes(texts, known, others, len(self.known["labels"]))
        return {
            "naive_bayes": float((read == truth).mean()),
            "commonest_class": float((np.bincount(known).argmax() == truth).mean()),
            "notes": [f"naive Bayes was fitted to the same {len(texts):,} training texts, whole"],
        }

    def samples(self, model, key) -> list[dict]:
        rows = [self.rows[i] for i in self.split["test"][:8]]
        read = np.asarray(self.predict(model, self.encode([row.text for row in rows]))).argmax(-1)
        return [{"prompt": row.text, "text": self.known["labels"][i], "right": self.known["labels"][i] == row.label}
                for row, i in zip(rows, read, strict=True)]  # fmt: skip

    def generate(self, model, prompt: str, options: dict, on_text) -> str:
        """The classes of a text with their probabilities, one per line, the likeliest first."""
        if not prompt.strip():
            raise UserError("there is no text to classify", where="prompt", hint="--prompt 'TEXT'")
        shares = np.asarray(self.predict(model, self.encode([prompt])))[0]
        text = "\n".join(f"{self.known['labels'][i]} {shares[i]:.3f}" for i in np.argsort(-shares, kind="stable"))
        on_text(f"\n{text}")
        return text


def _table(data: DataConfig) -> labelled.Table:
    return labelled.Table(data.source, data.text_field, data.label_field, data.damaged)
