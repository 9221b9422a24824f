"""Copying from the document so far: matches are a function of the document's ids, the same however they are found; the
mixture is a distribution, in training and in sampling; and a run with it is planned, killed, resumed and scored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpora import config, write_folder
from flax import nnx
from kit import in_process

from aurora_train.generate.engine import Engine
from aurora_train.generate.requests import Request, Sampling
from language import matches
from language.copying import CopyingDecoder, found
from language.prepare import prepare
from language.rows import TokenSource
from language.starting import CopyingConfig
from language.windows import windows

CONTEXTS = (1, 2, 3, 5, 8)


def by_definition(document, contexts):
    """int[tokens, contexts, 3], token by token."""
    result = np.zeros((len(document), len(contexts), 3), int)
    for here in range(len(document)):
        for k, length in enumerate(contexts):
            if length > here + 1:
                continue
            last = document[here - length + 1 : here + 1]
            earlier = [s for s in range(length - 1, here) if document[s - length + 1 : s + 1] == last]
            if earlier:
                result[here, k] = document[earlier[-1] + 1], len(earlier), here - earlier[-1]
    return result


def documents(seed=0, lengths=(60, 1, 2, 45, 90)):
    """Few distinct tokens, so that they repeat; 0 begins each."""
    random = np.random.default_rng(seed)
    return [[0, *random.integers(1, 4, length - 1).tolist()] for length in lengths]


def test_matches_are_those_of_their_definition_in_every_document_by_itself():
    texts = documents()
    offsets = np.cumsum([0, *map(len, texts)])
    distance, seen = matches.find(np.concatenate(texts).astype(np.uint16), offsets, CONTEXTS)
    wanted = np.concatenate([by_definition(text, CONTEXTS) for text in texts])
    assert np.array_equal(distance, wanted[..., 2])
    assert np.array_equal(seen, wanted[..., 1])
    assert (distance > 0).any(axis=0).all()  # each length of context was met


def test_a_row_of_several_documents_finds_in_each_what_it_has_by_itself():
    texts = documents()
    row = jnp.asarray([sum(texts, [])])
    segments = jnp.asarray([np.repeat(np.arange(len(texts)), [len(text) for text in texts]) + 1])
    places = jnp.arange(row.shape[1])[None]
    wanted = np.concatenate([by_definition(text, CONTEXTS) for text in texts])
    assert np.array_equal(jax.jit(found, static_argnums=2)(row, places, CONTEXTS, segments)[0], wanted)


VOCAB = 24


@pytest.fixture(scope="module")
def model():
    """With gates and inputs that are not zero, as after training."""
    config = CopyingConfig(width=32, layers=2, heads=2, copying=CONTEXTS, tied=False)
    model = CopyingDecoder(config, VOCAB, "float32", nnx.Rngs(0))
    for seed, weight in enumerate((model.copying, model.gates.head.hidden, model.gates.head.down)):
        weight[...] = 0.5 * jax.random.normal(jax.random.key(seed), weight.shape)
    return model


def test_the_mixture_is_a_distribution_and_its_losses_are_those_of_its_logits(model):
    texts = documents(1)
    row, targets = (np.array([sum(texts, [])[i : 190 + i]], np.int32) for i in (0, 1))
    segments = np.repeat(np.arange(len(texts)), [len(text) for text in texts])[None, :190] + 1
    graph, state = nnx.split(model)

    @jax.jit
    def read(state, row, targets, segments):
        model = nnx.merge(graph, state)
        hidden = model(row, segments)
        weights = jnp.linspace(0, 2, row.size).reshape(row.shape)
        own = model.token_nll(hidden._replace(gates=hidden.gates.at[..., 0].set(0).at[..., 1:].set(-1e30)), targets)
        found = {"logits": model.logits(hidden), "nll": model.token_nll(hidden, targets), "own": own,
                 "gates": hidden.gates, "weights": weights}  # fmt: skip
        return found | {"sum": model.nll(hidden, targets, weights)[0],
                        "objective": model.objective(hidden, targets, weights)[0]}  # fmt: skip

    found = {name: np.asarray(array, np.float64) for name, array in read(state, row, targets, segments).items()}
    np.testing.assert_allclose(np.exp(found["logits"]).sum(-1), 1, atol=1e-5)
    wanted = -np.take_along_axis(found["logits"], targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found["nll"], wanted, atol=1e-5)
    np.testing.assert_allclose(found["sum"], (wanted * found["weights"]).sum(), rtol=1e-5)
    wanted += 0.3 * found["own"]
    np.testing.assert_allclose(found["objective"], (wanted * found["weights"]).sum(), rtol=1e-5)
    assert np.exp(found["gates"][..., 1:]).sum(-1).max() > 0.5  # it does copy

    def sums(state, by_token):
        model = nnx.merge(graph, state)
        hidden, weights = model(row, segments), jnp.asarray(found["weights"], jnp.float32)
        if not by_token:
            return model.objective(hidden, targets, weights)[0]
        plain = super(CopyingDecoder, model).token_nll(hidden.hidden, targets)
        return ((model.token_nll(hidden, targets) + 0.3 * plain) * weights).sum()

    chunked, whole = (jax.jit(jax.grad(sums), static_argnums=1)(state, by_token) for by_token in (False, True))
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole):
        mine = dict(jax.tree_util.tree_leaves_with_path(chunked))[path]
        np.testing.assert_allclose(mine, leaf, atol=2e-4, rtol=1e-3, err_msg=jax.tree_util.keystr(path))


def written(engine, prompts):
    """[(ids, log-probabilities of the likeliest [answer, (id, logprob)])] of greedy answers of 12 tokens."""
    heard = [[] for _ in prompts]
    for prompt, tokens in zip(prompts, heard, strict=True):
        sampling = Sampling(temperature=0)
        engine.submit(Request(tuple(prompt), 12, sampling, logprobs=20), lambda token, _, to=tokens: to.append(token))
    while engine.advance():
        pass
    return [tokens[:-1] for tokens in heard]


WAYS = {"one at a time": {"slots": 1, "chunk": 64}, "in chunks, beside others": {"slots": 3, "chunk": 16},
        "all prompts at once": {"slots": 5, "chunk": 32, "together": True}}  # fmt: skip


@pytest.mark.parametrize("way", [WAYS["in chunks, beside others"],
                                 *(pytest.param(WAYS[name], marks=pytest.mark.slow) for name in
                                   ("one at a time", "all prompts at once"))])  # fmt: skip
def test_what_is_written_token_by_token_has_the_scores_of_the_whole_text(model, way):
    prompts = documents(2, (37, 1, 16, 50, 5))
    answers = written(Engine(model, length=64, **way), prompts)
    rows = np.zeros((len(prompts), 64), np.int32)
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        text = [*prompt, *(token.id for token in answer)]
        row[: len(text)] = text
    graph, state = nnx.split(model)
    wanted = np.asarray(jax.jit(lambda state: (m := nnx.merge(graph, state)).logits(m(rows)))(state))
    for row, prompt, answer in zip(wanted, prompts, answers, strict=True):
        assert len(answer) == 12
        for scores, token in zip(row[len(prompt) - 1 :], answer, strict=False):
            assert scores.max() - scores[token.id] < 1e-4
            assert all(abs(value - scores[i]) < 1e-4 for i, value in token.top)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copying")
    store = prepare(config(write_folder(folder / "text"), "bpe"), folder / "cache")
    return store, matches.prepare_matches(store, CONTEXTS, folder / "cache", lambda *_: None)


def test_rows_and_windows_see_the_whole_document_so_far_wherever_they_are_cut(prepared):
    store, kept = prepared
    wanted = [by_definition(np.asarray(one.tokens[:-1]).tolist(), CONTEXTS) for one in store.documents("test")]
    source = TokenSource(store, "test", 16, None, kept)
    taken = source.take(np.arange(len(source)))
    assert np.array_equal(taken["matches"][taken["weights"] > 0], np.concatenate(wanted))
    assert not taken["matches"][taken["weights"] == 0].any()
    assert source.fingerprint != TokenSource(store, "test", 16).fingerprint
    beside = {"matches": kept.documents("test"), "place": [np.arange(len(one)) for one in wanted]}
    counted = 0
    for batch in windows([one.tokens for one in store.documents("test")], 16, 5, 4, beside):
        scored = batch["document"] >= 0
        for document, place, has in zip(*(batch[n][scored] for n in ("document", "place", "matches")), strict=True):
            assert np.array_equal(has, wanted[document][place])
        assert not batch["matches"][batch["segments"] == 0].any()
        counted += scored.sum()
    assert counted == sum(map(len, wanted))


def test_blocks_of_documents_are_sorted_apart_and_change_nothing(prepared, tmp_path, monkeypatch):
    store, kept = prepared
    monkeypatch.setattr(matches, "_BLOCK", 150)
    again = matches.prepare_matches(store, CONTEXTS, tmp_path, lambda *_: None)
    assert again.manifest["files"] == kept.manifest["files"]


@pytest.mark.parametrize(
    ("given", "said"),
    [("[2, 3]", "begins with a context of 1"), ("[1, 3]", "1 is followed by 2 to 2"), ("[1, 2, 2]", "3 to 4, not 2")],
)
def test_contexts_that_cannot_be_chained_are_refused_with_what_can(given, said, capsys):
    assert in_process("check", "quickstart", f"model.copying={given}") == 2
    assert said in capsys.readouterr().err
