"""Supervised tuning: a language model learns the answers of conversations, and nothing else of them.

The loss is on what the assistant says and on the tokens that end it, in the text that the model's chat template makes
of a conversation. The same recipe trains all parameters, adapters (`model.lora`), or adapters on a base in four bits.
"""

from __future__ import annotations

import functools
import logging
import math
from datetime import datetime
from pathlib import Path

import numpy as np

from aurora_train.config import Section, setting
from aurora_train.errors import UserError
from aurora_train.evals.intervals import comparison_table, interval_table
from aurora_train.facts import DATE
from aurora_train.interop.kept import TEMPLATE
from aurora_train.recipe import few
from language import conversations, exact_match
from language.settings import ALL_HELD_OUT, TokenizerConfig, check_tokenizer, use_of
from language.settings_tune import ConversationDataConfig
from language.starting import ModelConfig
from language.text_recipe import Samples, Writer, refuse_no_test

log = logging.getLogger("aurora_train")


class DataConfig(ConversationDataConfig):
    tokenizer: TokenizerConfig = setting(TokenizerConfig())
    template: str | None = setting(
        None, resume="located", path_unless=(),
        help="a file with the chat template of a model that brings none; see also init.tokens for the tokens it needs",
    )  # fmt: skip


class Scoring(Section):
    """How the held-out conversations are read."""

    batch: int = setting(8, resume="free", ge=1, help="packed rows at a time")
    exact: int = setting(
        0, resume="free", ge=0,
        help="so many held-out conversations are answered, and compared with their own answers: the exact match",
    )
    exact_batch: int = setting(64, resume="free", ge=1, help="conversations answered at a time")


class Config(Section):
    model: ModelConfig = setting(ModelConfig())
    data: DataConfig = setting(DataConfig())
    score: Scoring = setting(Scoring())
    samples: Samples = setting(Samples())


class Tune(Writer):
    """One decoder, cross-entropy on the answers, scored by that of held-out conversations."""

    Config = Config
    unit = "answer tok"
    store = None  # the prepared pieces, once there are any

    @property
    def metric(self) -> tuple[str, str]:
        """The exact match if it is scored, else the loss of the answers."""
        return ("exact_match", "max") if self.config.score.exact else ("answer_loss", "min")

    @classmethod
    def check(cls, config) -> None:
        data = config.data
        check_tokenizer(data.tokenizer, None)
        if data.tokenizer.kind == "bpe":
            raise UserError(
                "conversations train no tokenizer", where="data.tokenizer.kind",
                hint="model.from=SOURCE brings one, data.tokenizer.path=FILE names one, and kind: byte needs none",
            )  # fmt: skip
        if data.template is not None:
            from language.chat import read_template

            read_template(Path(data.template).expanduser())
        cls.check_rows(config)
        refuse_no_test(config)
        super().check(config)

    @classmethod
    def check_rows(cls, config) -> None:
        """Raise the UserError that reading the first rows of the data would raise."""
        conversations.check(config.data)

    def prepare(self, progress) -> None:
        from language.packing import arrange
        from language.prepare_pieces import Encoding, prepare

        data = self.config.data
        tokenizer, learned, decisive = self.reading()
        encoding = Encoding(
            "conversations", conversations.read, learned, decisive,
            functools.partial(arrange, sequence=data.sequence, names=sorted(data.mix) or [""]),
        )  # fmt: skip
        self.store = prepare(encoding, data, self.cache / "data", tokenizer, progress)
        split, use = use_of(data)
        rows, fill = sum(self.store.manifest["packed_rows"][split].values()), self.store.manifest["fill"][split] or 0.0
        self.sum_up(progress, rows, f"{rows:,} packed rows of {data.sequence:,} tokens to {use}, {fill:.1%} full")

    def sum_up(self, progress, rows: int, made_of_them: str) -> None:
        """Say what was read, what was left out of it, and what was made of the rest."""
        for line in self.store.losses():
            log.warning("%s", line)
        progress(rows, rows, "; ".join([*self.store.summary(), made_of_them]))

    def reading(self) -> tuple:
        """(the tokenizer, `answers.learn` as a function of a conversation, and what decides it besides)."""
        from language.answers import learn
        from language.chat import decisive
        from language.tokenizers import known_tokenizer

        tokenizer = known_tokenizer(self.config.data.tokenizer, None, self.inherited_tokenizer)
        facts = self._facts_of(tokenizer)
        dialogue = dialogue_of(tokenizer, facts)
        return tokenizer, lambda one: learn(one, tokenizer, facts, dialogue), decisive(facts)

    def facts(self) -> dict:
        return self._facts_of(self.store.tokenizer)

    def _facts_of(self, tokenizer) -> dict:
        """The tokenizer, the template with its date (the day on which a run began), and what a base brought."""
        from language.chat import read_template

        facts, file = self.facts_with(tokenizer), Path(self.config.data.template or "").expanduser()
        if self.config.data.template and (TEMPLATE not in facts or file.is_file()):  # a run that has it needs no file
            facts[TEMPLATE] = read_template(file)
        return facts | ({DATE: self.inherited.get(DATE, self._today)} if TEMPLATE in facts else {})

    @functools.cached_property
    def _today(self) -> str:
        """Asked once: the rows that are prepared and the facts of the run have the same date, past midnight too."""
        return datetime.now().replace(hour=0, minute=0, second=0, microsecond=0).isoformat()

    def on(self, path: str):
        """A recipe whose test split is all conversations of a source, in this run's tokenizer and template."""
        return self.scoring(
            source=path, mix={}, pattern="**/*", max_rows=None, tokenizer=TokenizerConfig(), template=None,
            holdout_test=ALL_HELD_OUT, holdout_validation=0.0,
        )  # fmt: skip

    def data(self, split: str):
        from language.packing import PackedRows

        if split == "validation" and self.config.data.holdout_validation == 0:
            return None
        return PackedRows(self.store, split, self.config.data.sequence, self.weights_of(split))

    def texts(self):
        return self.store.texts("train")

    def weights_of(self, split: str) -> dict[str, float] | None:
        """The weights of a mixture's sources, which are for training alone; None without a mixture."""
        return {name: part.weight for name, part in self.config.data.mix.items() if split == "train"} or None

    @property
    def _learned_share(self) -> float | None:
        """Of the tokens that training reads, the share that is learned; None before rows are packed."""
        is_packed = self.store is not None and "packed_rows" in self.store.manifest
        return self.data("train").learned_share if is_packed else None

    @property
    def targets_per_example(self) -> float | None:
        share = self._learned_share
        return share and share * self.store.manifest["fill"]["train"] * self.config.data.sequence

    def flops(self, num_trained: int, num_frozen: int) -> float:
        """For each learned token, those of all tokens that are read for it: a prompt is computed as an answer is."""
        return super().flops(num_trained, num_frozen) / (self._learned_share or 1.0)

    def predict(self, model, batch: dict):
        """(-log p of each target in nats, float32[B, T]; whether the target is the likeliest token, bool[B, T])."""
        hidden = model(batch["tokens"], batch["segments"], batch["positions"])
        return model.token_scores(hidden, batch["targets"])

    def score(self, predict, split, key, workdir, progress) -> dict:
        from language import answer_scores

        found = answer_scores.sums(self.data(split), predict, self.config.score.batch, progress)
        np.savez(workdir / "answers.npz", **found)
        exact = self._exact(predict, split, workdir, progress)
        more, apart = "raise data.holdout_test", " held out by a hash of their content"
        if self.config.data.holdout_test == ALL_HELD_OUT:  # other data, which may hold the same conversations
            more, apart = "more conversations", ""
        number = len(found["conversation"])
        return {
            **exact,
            **answer_scores.numbers(found),
            **answer_scores.by_source(found, list(self.store.manifest["sources"])),
            "tables": [interval_table(answer_scores.measures(workdir))],
            "remarks": few(number, "conversation", more),
            "notes": [
                f"{number:,} whole conversations{apart}; the loss is that of the answers and their ends, each read "
                "after what came before it; bits are per byte of the answers' text"
            ],
        }  # fmt: skip

    def _exact(self, predict, split: str, workdir: Path, progress) -> dict[str, float]:
        """{"exact_match": its share} if `score.exact` asks for it. The answers are left in the work folder."""
        generator, batch = self._generator(predict.model()), self.config.score.exact_batch
        pieces = self.store.of_split(split)
        if self.config.data.overlong == "cut":
            pieces = exact_match.whole(self.store, pieces, self.config.data.sequence, generator.ends)
        pieces = pieces[: self.config.score.exact]
        if not len(pieces):
            (workdir / "exact.npz").unlink(missing_ok=True)  # of an earlier score
            return {}
        found = exact_match.answers(self.store, pieces, generator, batch, progress)
        np.savez(workdir / "exact.npz", **found)
        return {"exact_match": float(found["exact"].mean())}

    def compared(self, before: Path, after: Path) -> dict:
        from language import answer_scores

        return comparison_table(*map(answer_scores.measures, (before, after)))

    def writes(self) -> tuple[int, int] | None:
        samples, row = self.config.samples, self.config.data.sequence
        score = getattr(self.config, "score", None)  # a recipe built on this one may have no exact match
        scored = score.exact_batch if score is not None and score.exact else 0
        most = max((samples.count, row + samples.max_tokens), (scored, row + exact_match.LONGER), key=math.prod)
        return most if most[0] else None

    def begun(self) -> list[tuple[str, str | list[int], dict]]:
        """`samples.prompts` as a user's messages; without any, held-out conversations up to their first answer."""
        wanted, dialogue = self.config.samples, dialogue_of(self.tokenizer, self.known)
        if wanted.prompts:
            chosen = [wanted.prompts[i % len(wanted.prompts)] for i in range(wanted.count)]
            if dialogue is None:
                return super().begun()
            return [(text, dialogue.ids([{"role": "user", "content": text}]), {}) for text in chosen]
        pieces = self.store.of_split("test") if self.store is not None else []
        return [self._held_out(int(piece)) for piece in pieces[: wanted.count]]

    def _held_out(self, piece: int) -> tuple[str, list[int], dict]:
        before, answer = self.store.shown(piece)[:2]
        length = int(np.flatnonzero(self.store.learned(piece))[0])
        return before[0], self.store.ids(piece)[:length].tolist(), {"reference": answer[0]}

    def _ends(self) -> set[int]:
        dialogue = dialogue_of(self.tokenizer, self.known)
        return super()._ends() if dialogue is None else dialogue.ends()


def dialogue_of(tokenizer, facts: dict):
    """The `Dialogue` of a run's template; None if it has none."""
    from language.chat import Dialogue

    return Dialogue(tokenizer, facts) if TEMPLATE in facts else None
