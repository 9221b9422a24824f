"""A model of ours behind lm-eval's model interface: what its tasks ask, answered as its own Hugging Face backend would.

lm-eval cuts contexts from continuations itself (`TemplateLM`), so that both backends score the same tokens. Importing
this module imports lm_eval.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from aurora_train.errors import UserError
from aurora_train.interop.kept import ORIGIN, beginning

_TOKENS_AT_ONCE = 8192  # of a batch: what their hidden states and a chunk of logits take is small beside the model
_MAX_ROWS, _MAX_STREAMS = 64, 32
_DEFAULT_NEW_TOKENS = 256  # as lm-eval's own backends


class Scored(NamedTuple):
    """A row to score: the last `counted` of `tokens` are the continuation, what stands before them the context."""

    tokens: Sequence[int]
    counted: int


class Adapter(TemplateLM):
    """A loaded language model (`loading.Loaded`) for lm-eval. `progress(done, total, what)` is called as it works.

    Raises UserError if the model does not continue text.
    """

    def __init__(self, trained, progress):
        super().__init__()
        self._trained, self._progress = trained, progress
        self._text, facts = trained.tokenizer, getattr(trained.recipe, "known", None) or {}
        if self._text is None or not hasattr(trained.model, "token_scores"):
            raise UserError("the tasks of lm-eval are asked of models that continue text", where="--suite",
                            why=f"{trained.config.recipe} trains another kind of model")  # fmt: skip
        origin = facts.get(ORIGIN) or {}
        marks, adds = origin.get("tokens") or {}, (origin.get("tokenizer") or {}).get("add_bos_token")
        self._end = self._id_of(marks.get("eos_token"), self._text.eos_id)
        self._ends = frozenset(origin.get("eos_ids") or [self._end])
        self._prefix = self._id_of(marks.get("bos_token"), self._end)
        begins = beginning(self._text.backend, marks.get("bos_token"), adds) if origin else None
        self._begins = [] if begins is None else [self._id_of(begins, self._prefix)]
        self.max_length = _reach(trained, origin)

    def _id_of(self, token: str | None, default: int) -> int:
        """The id of a special token, or `default` if there is none of this name."""
        backend = self._text.backend
        found = None if token is None or backend is None else backend.token_to_id(token)
        return default if found is None else found

    # ---- what lm-eval's cutting of texts asks for

    @property
    def eot_token_id(self) -> int:
        return self._end

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids of a text in which control tokens may be written out; begun as the model's own tokenizer begins a text,
        unless the text does so itself or is a continuation."""
        own = string.startswith(self._text.token(self._prefix) or "\0")
        begins = [] if own or add_special_tokens is False else self._begins
        return [*begins, *self._text.encode_marked(string).tolist()]

    # ---- likelihoods

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(ln p, whether it is the likeliest) of each continuation after its context."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        for (context, continuation), _, ids in requests:
            if not ids or len(ids) > self.max_length:
                raise UserError(
                    f"a continuation has {len(ids)} tokens, where 1 to {self.max_length} can be scored",
                    where="--suite",
                    why=f"it is {continuation[:40]!r}, after {context[-40:]!r}",
                )  # fmt: skip
        return self._scores([Scored([*context, *ids], len(ids)) for _, context, ids in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """ln p of each whole text, whose windows of the model's length do not overlap; every token is counted once."""
        rows, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self._prefix, self.max_length, 1)
            for context, ids in map(make_disjoint_window, windows):
                rows.append(Scored([*context, *ids], len(ids)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (score, _) in zip(owners, self._scores(rows), strict=True):
            totals[number] += score
        return totals

    def _scores(self, rows: list[Scored]) -> list[tuple[float, bool]]:
        """(ln p of the counted tokens, whether each of them is the likeliest) of each row, in the order of the rows."""
        predict = self._trained.evaluator.under(_TokenScores(self._trained.config)).predictor(self._trained.state)
        results: list = [None] * len(rows)
        for done, chosen, length, height in _batches([len(row.tokens) for row in rows], self.max_length):
            self._progress(done, len(rows), "scoring continuations")
            tokens, targets = np.zeros((2, height, length), np.int32)
            kept = [rows[number].tokens[-(self.max_length + 1) :] for number in chosen]
            for line, ids in enumerate(kept):
                tokens[line, : len(ids) - 1], targets[line, : len(ids) - 1] = ids[:-1], ids[1:]
            nll, is_likeliest = predict({"tokens": tokens, "targets": targets})
            for line, number in enumerate(chosen):
                stop = len(kept[line]) - 1
                part = slice(stop - rows[number].counted, stop)
                results[number] = float(-nll[line, part].sum()), bool(is_likeliest[line, part].all())
        return results

    # ---- generation

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The text that the model writes after each context, up to the first of the task's stop strings, an end of
        text, or the most tokens that the task allows."""
        texts: list[str | None] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for numbers in groups.values():
            asked = normalize_gen_kwargs(requests[numbers[0]].args[1], _DEFAULT_NEW_TOKENS)
            for number, text in self._continued([(n, requests[n].args[0]) for n in numbers], asked):
                texts[number] = text
        return texts

    def _continued(self, asked: list[tuple[int, str]], settings: dict) -> Iterator[tuple[int, str]]:
        """(number, continuation) of each of the (number, context), all with the same settings of lm-eval."""
        stops = handle_stop_sequences(settings["until"], eos=self._text.token(self._end))
        new, room = settings["max_gen_toks"], self.max_length - settings["max_gen_toks"]
        if room < 1:
            raise UserError(f"the task generates up to {new} tokens, and the model holds {self.max_length}",
                            where="--suite", hint="set generation_kwargs: {max_gen_toks: N} in the task")  # fmt: skip
        contexts = {number: self.tok_encode(text)[-room:] or [self._prefix] for number, text in asked}
        drawing = {"temperature": settings["temperature"] if settings["do_sample"] else 0.0,
                   "top_k": settings.get("top_k"), "top_p": settings.get("top_p", 1.0)}  # fmt: skip
        for number, ids in self._written(contexts, new, stops, drawing).items():
            yield number, postprocess_generated_text(self._shown(ids), stops, None)

    def _written(self, contexts: dict[int, list[int]], new: int, stops: list[str], drawing: dict) -> dict:
        """The ids written after each context, up to a stop string and perhaps a few more."""
        from aurora_train.generate.engine import Engine, bucket
        from aurora_train.generate.requests import Request, Sampling
        from aurora_train.nn.tracing import tracing

        made: dict[int, list[int]] = {number: [] for number in contexts}
        looked_at = 4 * max(map(len, stops)) + 8  # tokens within which a stop string that has just ended must lie

        def listen(number, token, reason):
            if token is not None:
                made[number].append(token.id)
                if any(stop in self._shown(made[number][-looked_at:]) for stop in stops):
                    engine.cancel(tickets[number])

        with tracing(forms=self._trained.config.train.forms):
            longest = max(map(len, contexts.values())) + new
            engine = Engine(self._decoded, min(_MAX_STREAMS, len(contexts)), bucket(longest, 64), together=True)
            tickets = {}
            for number, ids in sorted(contexts.items(), key=lambda pair: len(pair[1])):
                request = Request(tuple(ids), new, Sampling(**drawing, row=number), self._ends)
                tickets[number] = engine.submit(request, functools.partial(listen, number))
            while engine.advance():
                done = sum(ticket.reason is not None for ticket in tickets.values())
                self._progress(done, len(contexts), "generating")
        return made

    @functools.cached_property
    def _decoded(self):
        """The model as it is decoded, made once for all tasks that generate."""
        from aurora_train.generate.weights import decoded

        return decoded(self._trained.model)

    def _shown(self, ids: Sequence[int]) -> str:
        """The text of ids, without control tokens."""
        hidden = set(self._text.controls.values())
        return self._text.decode([one for one in ids if one not in hidden])


class _TokenScores:
    """What an `Evaluator` calls as a recipe's `predict`: the score of every token of right-padded rows."""

    def __init__(self, config):
        self.config = config

    def predict(self, model, batch: dict):
        return model.token_scores(model(batch["tokens"]), batch["targets"])


def _reach(trained, origin: dict) -> int:
    """The most tokens that the model reads at once: as it was published, or as long as the rows it was trained on."""
    model, data = trained.config.model, getattr(trained.config, "data", None)
    if model.positions == "learned":
        return model.max_length
    return origin.get("max_length") or getattr(data, "sequence", None) or model.max_length


def _batches(sizes: list[int], longest: int) -> Iterator[tuple[int, list[int], int, int]]:
    """(number of rows before, rows, their padded length, padded number of rows) of each batch, the longest rows first.

    `sizes`: the tokens of each row, of which the last is only a target. A padded length is a power of two or three
    quarters of one, so that a few programs serve all rows.
    """
    order = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    done = 0
    while done < len(order):
        length = min(_rounded(max(sizes[order[done]] - 1, 1)), longest)
        height = max(1, min(_MAX_ROWS, _TOKENS_AT_ONCE // length))
        yield done, order[done : done + height], length, height
        done += height


def _rounded(size: int) -> int:
    power = max(16, 1 << (size - 1).bit_length())
    return 3 * power // 4 if size <= 3 * power // 4 else power
