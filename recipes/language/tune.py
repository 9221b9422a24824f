"""Supervised tuning: a language model learns the answers of conversations, and nothing else of them.

The loss is on what the assistant says and on the tokens that end it, in the text that the model's chat template makes
of a conversation. The same recipe trains all parameters, adapters (`model.lora`), or adapters on a base in four bits.
"""

from __future__ import annotations

import functools
from datetime import datetime
from pathlib import Path

import numpy as np

from aurora_train.config import Section, setting
from aurora_train.errors import UserError
from aurora_train.facts import DATE
from aurora_train.interop.kept import TEMPLATE
from aurora_train.recipe import few
from language import conversations
from language.settings import ALL_HELD_OUT, TokenizerConfig, check_tokenizer
from language.settings_tune import ConversationDataConfig
from language.starting import ModelConfig
from language.text_recipe import Samples, Writer, refuse_no_test


class DataConfig(ConversationDataConfig):
    tokenizer: TokenizerConfig = setting(TokenizerConfig())
    template: str | None = setting(
        None, resume="located", path_unless=(),
        help="a file with the chat template of a model that brings none; see also init.tokens for the tokens it needs",
    )  # fmt: skip


class Scoring(Section):
    """How the held-out conversations are read."""

    batch: int = setting(8, resume="free", ge=1, help="packed rows at a time")


class Config(Section):
    model: ModelConfig = setting(ModelConfig())
    data: DataConfig = setting(DataConfig())
    score: Scoring = setting(Scoring())
    samples: Samples = setting(Samples())


class Tune(Writer):
    """One decoder, cross-entropy on the answers, scored by that of held-out conversations."""

    Config = Config
    unit, metric = "answer tok", ("answer_loss", "min")
    store = None  # the prepared pieces, once there are any

    @classmethod
    def check(cls, config) -> None:
        data = config.data
        check_tokenizer(data.tokenizer, None)
        if data.tokenizer.kind == "bpe":
            raise UserError(
                "conversations train no tokenizer", where="data.tokenizer.kind",
                hint="model.from=SOURCE brings one, data.tokenizer.path=FILE names one, and kind: byte needs none",
            )  # fmt: skip
        if data.template is not None and not Path(data.template).expanduser().is_file():
            raise UserError(f"there is no file {data.template}", where="data.template", hint="a chat_template.jinja")
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
        counts = self.store.manifest["splits"]["train"]
        rows = sum(self.store.manifest["packed_rows"]["train"].values())
        full = f"{self.store.manifest['fill']['train'] or 0:.1%} full"
        progress(rows, rows, f"{counts['conversations']:,} conversations in {rows:,} packed rows, {full}")

    def reading(self) -> tuple:
        """(the tokenizer, `answers.learn` as a function of a conversation, and what decides it besides)."""
        from language.answers import learn
        from language.tokenizers import known_tokenizer

        tokenizer = known_tokenizer(self.config.data.tokenizer, None, self.inherited_tokenizer)
        facts = self._facts_of(tokenizer)
        dialogue = dialogue_of(tokenizer, facts)
        return tokenizer, lambda one: learn(one, tokenizer, facts, dialogue), decisive(facts)

    def facts(self) -> dict:
        return self._facts_of(self.store.tokenizer)

    def _facts_of(self, tokenizer) -> dict:
        """The tokenizer, the template with its date (the day on which a run began), and what a base brought."""
        facts, file = self.facts_with(tokenizer), self.config.data.template
        if file is not None:
            facts[TEMPLATE] = Path(file).expanduser().read_bytes()
        today = datetime.now().replace(hour=0, minute=0, second=0, microsecond=0).isoformat()
        return facts | ({DATE: self.inherited.get(DATE, today)} if TEMPLATE in facts else {})

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
        mix = self.config.data.mix if split == "train" else {}
        weights = {name: part.weight for name, part in mix.items()} or None
        return PackedRows(self.store, split, self.config.data.sequence, weights)

    def predict(self, model, batch: dict):
        """(-log p of each target in nats, float32[B, T]; whether the target is the likeliest token, bool[B, T])."""
        hidden = model(batch["tokens"], batch["segments"], batch["positions"])
        return model.token_scores(hidden, batch["targets"])

    def score(self, predict, split, key, workdir, progress) -> dict:
        from language import answer_scores

        found = answer_scores.sums(self.data(split), predict, self.config.score.batch, progress)
        np.savez(workdir / "answers.npz", **found)
        more = "more conversations" if self.config.data.holdout_test == ALL_HELD_OUT else "raise data.holdout_test"
        number = len(found["conversation"])
        return {
            **answer_scores.numbers(found),
            "remarks": few(number, "conversation", more),
            "notes": [
                f"{number:,} whole conversations held out by a hash of their content; the loss is that of the answers "
                "and their ends, each read after what came before it; bits are per byte of the answers' text"
            ],
        }  # fmt: skip

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

    def _generator(self, model):
        from aurora_train.generate.sampler import Generator

        dialogue = dialogue_of(self.tokenizer, self.known)
        return super()._generator(model) if dialogue is None else Generator(model, dialogue.ends())


def dialogue_of(tokenizer, facts: dict):
    """The `Dialogue` of a run's template; None if it has none."""
    from language.chat import Dialogue

    return Dialogue(tokenizer, facts) if TEMPLATE in facts else None


def decisive(facts: dict) -> dict:
    """What decides how a conversation is encoded, besides the tokenizer: its template, with the date if that tells it,
    and the tokens that begin and end a text."""
    template = facts.get(TEMPLATE, b"").decode()
    origin = facts.get("origin") or {}
    return {
        "template": template, "date": facts.get(DATE) if "strftime_now" in template else None,
        **{name: origin.get(name) for name in ("tokens", "eos_ids", "bos_id", "tokenizer")},
    }  # fmt: skip
