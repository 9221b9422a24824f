"""`init.tokens`: special tokens that a base lacks get rows, are trained, and go out with a tokenizer that has them."""

import json

import numpy as np
import pytest
import tokenizers
from kit import in_process as aurora
from open_models import VOCABULARY, write_model

import aurora_train
from aurora_train.config import load as load_config
from aurora_train.errors import UserError
from aurora_train.interop.kept import facts_of
from aurora_train.interop.placing import matched
from aurora_train.interop.source import open_source
from aurora_train.interop.tokens import NewRows, with_tokens
from aurora_train.machine.precision import settled
from aurora_train.train.session import open_start_for_reading

TOKENS = [f"<|t{number}|>" for number in range(40)]  # more than the 31 rows that the model has to spare


@pytest.fixture(scope="module", autouse=True)
def plain(home):
    """An open model `plain` of two matrices in float32."""
    write_model(home / "plain")


@pytest.fixture(autouse=True)
def inside(here):
    """In the folder of `home`."""


def facts(here, **changed):
    opened = matched(open_source(here / "plain"))
    return facts_of(opened.source, opened.family.model_type) | changed


def test_tokens_take_spare_rows_first_and_then_new_ones(here):
    few, rows = with_tokens(facts(here), TOKENS[:2])
    assert rows == NewRows(257, 2) and few["vocabulary"] == VOCABULARY
    many, rows = with_tokens(facts(here), TOKENS)
    assert rows == NewRows(257, 40) and many["vocabulary"] == 297
    backend = tokenizers.Tokenizer.from_str(many["tokenizer.json"].decode())
    assert [backend.token_to_id(token) for token in TOKENS] == list(range(257, 297))
    assert backend.encode("a<|t3|>b", add_special_tokens=False).ids == [97, 260, 98]
    bytewise, _ = with_tokens(facts(here) | {"tokenizer.json": b'{"kind": "byte"}'}, TOKENS)
    assert tokenizers.Tokenizer.from_str(bytewise["tokenizer.json"].decode()).token_to_id("<|t39|>") == 296


@pytest.mark.parametrize(
    "tokens,said",
    [(["<|endoftext|>"], "has '<|endoftext|>' already, as id 256"), (["<a>", "<a>"], "named twice"), ([" "], "empty")],
)
def test_tokens_that_cannot_be_added_are_refused(tokens, said, here):
    with pytest.raises(UserError) as refused:
        with_tokens(facts(here), tokens)
    assert said in str(refused.value)
    with pytest.raises(UserError, match="no tokenizer to which"):
        with_tokens({}, ["<a>"])


def rows_at_first(*overrides):
    """The parameters with which a run would start."""
    config = settled(load_config("tiny.yaml", list(overrides)))
    return open_start_for_reading(config)[3].params


def test_new_rows_begin_as_the_mean_are_trained_and_go_out_and_come_back(here):
    asked = ("model.from=plain", f"init.tokens={json.dumps(TOKENS)}")
    run = aurora_train.train("tiny.yaml", list(asked), run="more", quiet=True)
    assert run.tokenizer.vocab_size == 297 and run.tokenizer.controls["<|t39|>"] == 296
    assert list(run.tokenizer.encode("<|t39|>")) == list(b"<|t39|>")  # text cannot produce a control token
    assert run.tokenizer.encode_marked("<|t39|>").tolist() == [296]
    base, first, last = matched(open_source(here / "plain")), rows_at_first(*asked), run.state.params
    for name, axis in (("embedding", 0), ("head", 1)):
        before, begun, ended = (np.moveaxis(np.asarray(one), axis, 0) for one in (
            base.read(name), first[name], last[name]))  # fmt: skip
        assert before.shape[0] == VOCABULARY and begun.shape[0] == 297
        assert np.array_equal(begun[:257], before[:257])
        np.testing.assert_allclose(begun[257:], np.broadcast_to(before[:257].mean(0), (40, 32)), atol=1e-6)
        assert axis == 0 or np.abs(ended[257:] - begun[257:]).max() > 1e-4  # no text has them, so the head alone learns
    assert aurora("export", "more", "--to", "wider", "--dtype", "float32") == 0
    out = matched(open_source(here / "wider"))
    assert out.vocabulary == 297 and np.array_equal(out.read("head"), np.asarray(last["head"]))
    assert tokenizers.Tokenizer.from_file("wider/tokenizer.json").token_to_id("<|t39|>") == 296
    assert json.loads((here / "wider" / "config.json").read_text())["vocab_size"] == 297
    assert aurora("import", "wider", "--to", "wider-run") == 0
    assert aurora_train.load("wider-run").tokenizer.controls["<|t39|>"] == 296


@pytest.mark.release
def test_a_run_is_a_base_too_and_hands_its_tokens_on(here, capsys):
    assert aurora("import", "plain", "--to", "plain-run") == 0
    two = 'init.tokens=["<a>", "<b>"]'
    begun = np.asarray(rows_at_first("model.from=plain-run", two)["embedding"])
    base = matched(open_source(here / "plain")).read("embedding")
    assert begun.shape[0] == VOCABULARY  # there were rows to spare
    assert np.array_equal(begun[:257], base[:257]) and np.array_equal(begun[259:], base[259:])
    np.testing.assert_allclose(begun[257:259], np.broadcast_to(base[:257].mean(0), (2, 32)), atol=1e-6)
    assert aurora("train", "tiny.yaml", "model.from=plain-run", two, "--run", "of-run", "--quiet") == 0
    assert aurora("train", "tiny.yaml", "model.from=of-run", "--run", "further", "--quiet") == 0
    assert aurora_train.load("further").tokenizer.controls["<b>"] == 258
    assert aurora("train", "tiny.yaml", "model.from=of-run", two, "--run", "twice", "--quiet") == 2
    assert "has '<a>' already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked,said",
    [
        pytest.param(("model.from=plain", "model.lora.rank=2"), "`embedding` is frozen", marks=pytest.mark.slow),
        pytest.param(("model.from=plain", "model.lora.targets=[query, embedding]"), "`head` is frozen",
                     marks=pytest.mark.release),
        ((), "tokens are added to the tokenizer of `from`"),
        (("model.from=plain", "init.facts=own"), "tokens are added to the tokenizer of `from`"),
    ],  # fmt: skip
)
def test_a_config_that_cannot_train_new_tokens_is_refused(asked, said, capsys):
    assert aurora("train", "tiny.yaml", 'init.tokens=["<a>"]', *asked, "--run", "none", "--quiet") == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_adapters_of_embedding_and_head_train_new_tokens_and_go_out_merged(here, capsys):
    forty = f"init.tokens={json.dumps(TOKENS)}"
    adapters = ('model.lora.targets=["*"]', "model.lora.rank=2")
    assert aurora("train", "tiny.yaml", "model.from=plain", forty, *adapters, "--run", "wide-adapted", "--quiet") == 0
    other = (forty, "model.lora.targets=[query, embedding, head]", "model.lora.rank=2")
    assert aurora("train", "tiny.yaml", "model.from=plain", *other, "--run", "wide-adapted", "--quiet") == 2
    assert "holds a run of another config" in capsys.readouterr().err  # what differs is a list
    trained = aurora_train.load("wide-adapted").model
    assert np.any(np.asarray(trained.embedding_lora_a[...])) and np.any(np.asarray(trained.head_lora_b[...])[:, 257:])
    assert aurora("export", "wide-adapted", "--to", "wide-merged", "--merge") == 0
    assert matched(open_source(here / "wide-merged")).vocabulary == 297
    capsys.readouterr()
    assert aurora("export", "wide-adapted", "--to", "none", "--format", "peft") == 2
    assert "adds no rows for new tokens" in " ".join(capsys.readouterr().err.split())
