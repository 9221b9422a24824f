"""What a request gets of the engine does not depend on its neighbours, and a slot keeps nothing of an earlier text."""

import jax
import numpy as np
import pytest
from test_sampler import PROMPT, SHAPES, VOCAB, decoder

from aurora_train.errors import UserError
from aurora_train.generate.engine import Engine
from aurora_train.generate.requests import Request, Sampling
from aurora_train.generate.sampler import Generator

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def llama():
    return decoder(**SHAPES["llama"])


@pytest.fixture
def engine(llama):
    return Engine(llama, slots=3, length=64, chunk=16)


class Heard:
    """Listens to one request."""

    def __init__(self):
        self.tokens, self.reasons = [], []

    def __call__(self, token, reason):
        assert (token is None) != (reason is None) and not self.reasons
        (self.tokens if reason is None else self.reasons).append(token or reason)

    @property
    def ids(self):
        return [token.id for token in self.tokens]


def ask(engine, *requests):
    """What each of these requests gets, all of them asked at once."""
    heard = [Heard() for _ in requests]
    for request, listener in zip(requests, heard, strict=True):
        engine.submit(request, listener)
    while engine.advance():
        pass
    return heard


def request(prompt=PROMPT, most=8, sampling=GREEDY, **more):
    return Request(tuple(prompt), most, sampling, **more)


def test_requests_that_share_slots_get_to_the_bit_what_each_gets_alone(engine, llama):
    requests = [
        request([1 + i, *PROMPT[: i % 5 + 1]] * (1 + i % 3), 4 + i, Sampling(seed=i, row=i, top_p=0.9))
        for i in range(8)
    ]
    together = [one.ids for one in ask(engine, *requests)]
    assert together == [ask(engine, one)[0].ids for one in requests]
    assert [len(ids) for ids in together] == [4 + i for i in range(8)]
    alone = Generator(llama, ()).generate(list(requests[0].prompt), 4, seed=0, top_p=0.9)
    assert alone == together[0]


def test_an_end_stops_a_text_and_is_not_given_and_the_length_stops_the_others(engine):
    (whole,) = ask(engine, request())
    assert len(whole.ids) == 8 and whole.reasons == ["length"]
    end = whole.ids[5]
    stopped, none = ask(engine, request(ends=frozenset({end, VOCAB + 1})), request(most=0))
    assert stopped.ids == whole.ids[: whole.ids.index(end)] and stopped.reasons == ["stop"]
    assert none.ids == [] and none.reasons == ["length"]


def test_a_cancelled_request_frees_its_slot_at_the_next_step_whether_it_waits_reads_or_writes(engine):
    heard = [Heard() for _ in range(5)]
    tickets = [engine.submit(request(PROMPT * 3, 40), one) for one in heard]
    for _ in range(3):
        engine.advance()
    assert engine.load == (3, 2) and heard[0].tokens
    for ticket in (tickets[0], tickets[2], tickets[4]):
        engine.cancel(ticket)
    engine.advance()
    assert engine.load == (2, 0)
    while engine.advance():
        pass
    assert [one.reasons[0] for one in heard] == ["cancelled", "length", "cancelled", "length", "cancelled"]
    assert heard[1].ids == heard[3].ids and not heard[4].tokens


def test_a_step_is_on_its_way_before_the_token_that_it_continues_has_been_read(engine):
    ahead = []

    def listen(token, reason):
        slot = engine._slots[0]
        ahead.append(None if slot is None else slot.drawn - len(ticket.drawn))

    ticket = engine.submit(request(most=6), listen)
    while engine.advance():
        pass
    assert ahead == [1, 1, 1, 1, None, None, None]  # the slot is free once its last token is on its way


def test_a_prompt_that_is_too_long_is_refused_with_the_room_there_is_or_cut_as_asked(engine):
    with pytest.raises(UserError, match="add up to 70, but the model has 64 positions") as caught:
        engine.submit(request([1] * 30, 40), Heard())
    assert "at most 34" in caught.value.hint
    heard = Heard()
    ticket = engine.submit(request(range(40), 40), heard, fit="cut")
    assert ticket.cut == 0 and ticket.request.max_tokens == 24
    ticket = engine.submit(request([i % VOCAB for i in range(80)], 9), heard, fit="cut")
    assert ticket.cut == 17 and ticket.request.prompt[:2] == (0, 18) and ticket.request.max_tokens == 1
    with pytest.raises(UserError, match="21 alternatives"):
        engine.submit(request(logprobs=21), heard)


def test_log_probabilities_are_those_of_the_model_without_a_cache(engine, llama):
    (heard,) = ask(engine, request(most=6, sampling=Sampling(temperature=2.0, top_k=3, seed=5), logprobs=4))
    text = np.array([PROMPT + heard.ids], np.int32)
    wanted = np.asarray(jax.nn.log_softmax(llama.logits(llama(text))[0], -1))[len(PROMPT) - 1 : -1]
    for token, row in zip(heard.tokens, wanted, strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
        assert [i for i, _ in token.top] == np.argsort(-row)[:4].tolist()
        np.testing.assert_allclose([value for _, value in token.top], np.sort(row)[::-1][:4], atol=1e-4)
    assert ask(engine, request(logprobs=0))[0].tokens[0].top == ()
    assert ask(engine, request())[0].tokens[0].logprob is None


def test_only_allowed_tokens_are_drawn_and_what_was_drawn_decides_what_is_allowed(engine):
    def rising(drawn):
        return np.arange(VOCAB) == (drawn[-1] + 2 if drawn else 7)

    free, bound = ask(engine, request(), request(allow=rising))
    assert bound.ids == [7, 9, 11, 13, 15, 17, 19, 21] and free.ids == ask(engine, request())[0].ids


def test_a_listener_or_a_constraint_that_fails_ends_its_own_answer_and_no_other(engine):
    def fails(*given):
        raise ValueError("mine")

    others, refused = [Heard(), Heard()], Heard()
    tickets = [engine.submit(request(), fails), engine.submit(request(allow=fails), refused)]
    tickets += [engine.submit(request(), one) for one in others]
    while engine.advance():
        pass
    assert [ticket.reason for ticket in tickets] == ["failed", "failed", "length", "length"]
    for ticket in tickets[:2]:
        with pytest.raises(ValueError, match="mine"):
            ticket.check()
    going, late = Heard(), Heard()
    engine.submit(request(), going)
    engine.advance()
    engine.submit(request(allow=fails), late)
    while engine.advance():
        pass
    assert late.reasons == ["failed"] and going.ids == others[0].ids
    assert refused.reasons == ["failed"] and all(one.ids == ask(engine, request())[0].ids for one in others)
    (none,) = ask(engine, request(allow=lambda drawn: np.full(VOCAB, not drawn)))
    assert len(none.ids) == 1 and none.reasons == ["stop"]


@pytest.mark.parametrize("shape", ["llama", "gemma"])
def test_an_answer_that_is_no_number_fails_alone_and_leaves_nothing_to_the_next_in_its_slot(shape):
    bad, model = VOCAB - 1, decoder(**SHAPES[shape])
    model.embedding[...] = model.embedding[...].at[bad].set(np.nan)
    sampling = Sampling(temperature=0, repetition_penalty=1.0)
    unlike = {"allow": lambda drawn: np.arange(VOCAB) != bad}  # of a tied model, the score of the token itself is NaN
    engine = Engine(model, slots=1, length=64, chunk=16)
    (clean,) = ask(engine, request(most=6, sampling=sampling, **unlike))
    assert clean.reasons == ["length"]
    for prompt, most in (([1, bad, 2], 6), ([1, bad, 2], 1), ([bad] * 40, 6)):
        failed, after = Heard(), Heard()
        ticket = engine.submit(request(prompt, most, sampling, **unlike), failed)
        engine.submit(request(most=6, sampling=sampling, **unlike), after)
        if len(prompt) == 40:  # left before a token was drawn
            engine.advance()
            engine.cancel(ticket)
        while engine.advance():
            pass
        assert (failed.ids, failed.reasons) == ([], ["cancelled" if len(prompt) == 40 else "failed"])
        assert (after.ids, after.reasons) == (clean.ids, ["length"])
    with pytest.raises(UserError, match="not finite"):
        Generator(model, ()).generate([1, bad], 3)


def test_a_penalty_weighs_on_the_prompt_and_on_what_was_drawn(engine):
    (once,) = ask(engine, request(most=20, sampling=Sampling(temperature=0, repetition_penalty=1e9)))
    assert len({*PROMPT, *once.ids}) == len({*PROMPT}) + 20  # no token twice
    assert ask(engine, request(most=20))[0].ids != once.ids


def test_the_planned_bytes_are_those_that_are_held(llama):
    for model, slots, length in ((llama, 3, 64), (decoder(**SHAPES["gemma"]), 2, 24)):
        engine = Engine(model, slots, length)
        planned = engine.planned_bytes()
        held = [sum(a.nbytes for a in jax.tree.leaves(tree)) for tree in (engine._weights, engine._caches)]
        assert held == [planned["weights"], planned["caches"]]
        assert engine._logits.nbytes + engine._knobs._seen.nbytes == planned["rest"]
        assert planned["per_slot"] * slots == planned["caches"] + planned["rest"]
    window, size = 5, 2 * 2 * 8 * 4  # keys and values of two heads of 8 numbers
    assert Engine(llama, 3, 64).planned_bytes()["caches"] == 2 * 3 * window * size
