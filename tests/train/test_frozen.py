"""Runs that train adapters on frozen parameters: what a step may touch, what a save writes, what a resume needs."""

import json
import shutil

import jax
import numpy as np
import pytest
from kit import evaluations, events, final_hash, losses
from safetensors.numpy import save_file

from aurora_train import load as load_run
from aurora_train.checkpoint import layout
from aurora_train.cli.main import main
from aurora_train.config import load
from aurora_train.data.batches import read_batch
from aurora_train.errors import UserError
from aurora_train.nn import nf4
from aurora_train.nn.lora import is_adapter
from aurora_train.run import Run
from aurora_train.train.session import open_session

RECIPE = '''"""Rows of counted tokens through a decoder."""
import numpy as np

from aurora_train.config import Section, setting
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.recipe import Loss
from aurora_train.recipe import Recipe as Base


class Config(Section):
    model: DecoderConfig = setting(DecoderConfig())


class Rows:
    fingerprint = "7" * 64

    def __len__(self):
        return 40

    def take(self, indices):
        tokens = (np.arange(17) * (1 + indices[:, None] % 5) + indices[:, None]) % 32
        return {"tokens": tokens.astype(np.int32)}

    def describe(self):
        return {"source": "counted"}


class Counted(Base):
    Config = Config

    def data(self, split):
        return Rows()

    def model(self, rngs):
        from aurora_train.nn.decoder import Decoder

        return Decoder(self.config.model, 32, self.config.train.dtype, rngs)

    def loss(self, model, batch, key):
        import jax.numpy as jnp

        tokens = batch["tokens"]
        return Loss(*model.nll(model(tokens[:, :-1], keys=key), tokens[:, 1:], jnp.ones(tokens[:, 1:].shape)))

    def predict(self, model, batch):
        return model.token_nll(model(batch["tokens"][:, :-1]), batch["tokens"][:, 1:])

    def score(self, predict, split, key, workdir, progress):
        return {"nll": float(predict(Rows().take(np.arange(40))).mean())}
'''
CONFIG = """recipe: counted.py
model: {width: 16, layers: 2, heads: 2, mlp_width: 32, dropout: 0.1, tied: false}
train: {steps: 6, batch: 8}
optimizer: {name: adamw, lr: 1e-2, ema: 0.9}
memory: {accumulation: 2, unroll: false}
checkpoint: {every: 2, keep: 2, best: 0}
evaluate: {every: 3, examples: 8}
"""
ADAPTED = ["model.lora.rank=3"]


def silent(done, total, what):
    pass


@pytest.fixture(scope="module")
def ready(tmp_path_factory, shared_cache):
    """A folder with a config, a finished run of the base (`base`) and one of adapters on it (`adapted`). Read only."""
    folder = tmp_path_factory.mktemp("frozen")
    (folder / "counted.py").write_text(RECIPE)
    (folder / "counted.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AURORA_CACHE", str(shared_cache))
        patch.chdir(folder)
        assert main(["train", "counted.yaml", "--run", "base", "--quiet"]) == 0
        assert main(["train", "counted.yaml", *ADAPTED, "init.from=base", "--run", "adapted", "--quiet"]) == 0
    return folder


@pytest.fixture
def here(ready, tmp_path, monkeypatch):
    """A copy of it, to be treated as one likes."""
    shutil.copytree(ready, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(folder, *overrides, run="new"):
    return open_session(load(folder / "counted.yaml", [*ADAPTED, *overrides]), Run(folder / run), silent)


def stepped(session, state, number):
    compiled, _ = session.compile()
    return compiled(state, jax.device_put(read_batch(session.source, 0, 8, number)))


def resumed_without(run, *steps):
    """Resume a finished run as though it had not finished, and had not saved these steps."""
    for step in steps:
        shutil.rmtree(run / "checkpoints" / str(step))
    kept = [line for line in (run / "events.jsonl").read_text().splitlines() if '"finish"' not in line]
    (run / "events.jsonl").write_text("\n".join(kept) + "\n")
    assert main(["resume", run.name, "--quiet"]) == 0


# ---- the step


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.release), 2])
def test_a_step_changes_adapters_alone_and_the_frozen_leaves_are_neither_donated_nor_moved(here, accumulation):
    session = opened(here, f"memory.accumulation={accumulation}")
    state = session.fresh()
    frozen, moving = jax.tree.leaves(state.frozen), jax.tree.leaves(state._replace(frozen={}))
    before = layout.snapshot(state)
    assert frozen and all(map(is_adapter, layout.snapshot(state.params)))
    state, metrics = stepped(session, state, 0)
    after = layout.snapshot(state)
    assert metrics["skipped"] == 0 and all(leaf.is_deleted() for leaf in moving)
    assert all(old is new for old, new in zip(frozen, jax.tree.leaves(state.frozen), strict=True))
    for name in before:
        if name.startswith("params."):  # the first update of A is nothing but decay, while B is zero
            assert np.any(before[name] != after[name]), name
        elif name.startswith("frozen."):
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    moments = [name for name in before if name.startswith("opt_state.")]
    assert moments and all(is_adapter(name) or before[name].ndim == 0 for name in moments)
    session.store.close()


@pytest.mark.slow
def test_a_bfloat16_run_keeps_frozen_matrices_in_two_bytes_and_its_first_loss_is_the_bases(here):
    def first(*overrides):
        config = load(here / "counted.yaml", ["train.precision=bfloat16", "model.dropout=0", *overrides])
        session = open_session(config, Run(here / "new"), silent)
        state = session.fresh()
        dtypes = {name: array.dtype.name for name, array in layout.snapshot(state.frozen).items()}
        session.store.close()
        return float(stepped(session, state, 0)[1]["loss"]), dtypes

    (loss, dtypes), (base, none) = first(*ADAPTED), first()
    assert loss == base and none == {}
    assert {dtypes[name] for name in ("embedding", "head")} == {"bfloat16"}
    for name, dtype in dtypes.items():
        assert dtype == ("float32" if "norm" in name else "bfloat16"), name


# ---- saving and resuming


def test_a_run_that_was_cut_off_after_its_first_save_ends_as_if_it_had_not_been(here):
    whole, run = here / "adapted", here / "cut"
    arguments = ["counted.yaml", *ADAPTED, "init.from=base", "--run", run.name, "--quiet"]
    assert main(["train", *arguments, "checkpoint.keep=9"]) == 0
    resumed_without(run, 4, 6)
    assert [event["step"] for event in events(run, "resume")] == [2]
    assert losses(run) == losses(whole) and evaluations(run) == evaluations(whole)
    assert final_hash(run) == final_hash(whole)
    arrays = (whole / "checkpoints" / "frozen" / "state").rglob("*")
    stored = [one.relative_to(whole) for one in arrays if one.is_file()]
    assert stored and all((run / one).samefile(whole / one) for one in stored), "one copy on disk serves both"


def test_the_frozen_parameters_are_written_once_and_every_checkpoint_names_them(ready):
    folder = ready / "adapted" / "checkpoints"
    seal = json.loads((folder / "frozen" / "manifest.aurora.json").read_text())
    steps = [path for path in folder.iterdir() if path.name.isdigit()]
    assert sorted(path.name for path in steps) == ["4", "6"]
    for path in steps:
        manifest = json.loads((path / "manifest.aurora.json").read_text())
        assert manifest["frozen"] == seal["digest"]
        stored = (path / "manifest.aurora.json").stat().st_mtime_ns
        assert (folder / "frozen" / "manifest.aurora.json").stat().st_mtime_ns < stored
    session = opened(ready, "init.from=base", run="adapted")
    own = session.store._checkpointer().metadata(6).metadata
    assert own and not any(name.startswith("frozen.") for name in own)
    session.store.sweep()
    assert (folder / "frozen" / "manifest.aurora.json").is_file()
    session.store.close()
    base = json.loads((ready / "base" / "checkpoints" / "6" / "manifest.aurora.json").read_text())
    assert "frozen" not in base and not (ready / "base" / "checkpoints" / "frozen").exists()


def test_what_a_run_left_that_was_killed_before_its_first_checkpoint_is_written_anew(here):
    old = here / "adapted" / "checkpoints" / "frozen"
    shutil.copytree(old, here / "again" / "checkpoints" / "frozen")  # sealed, and of other weights than this run draws
    session = opened(here, run="again")
    session.store.sweep()
    session.store.save(1, session.fresh(), {})
    session.store.close()
    session.store.refuse_frozen_damage(1)
    assert session.store.record(1)["frozen"] != json.loads((old / "manifest.aurora.json").read_text())["digest"]


@pytest.mark.parametrize("harm", ["missing", "one byte", "another run's"])
def test_a_frozen_folder_that_is_not_what_was_written_is_one_clear_error(here, capsys, harm):
    folder = here / "adapted" / "checkpoints" / "frozen"
    if harm == "one byte":
        victim = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        body = bytearray(victim.read_bytes())
        body[len(body) // 2] ^= 1
        victim.write_bytes(body)
    else:
        shutil.rmtree(folder)
    if harm == "another run's":
        assert main(["train", "counted.yaml", *ADAPTED, "init.final_norm=base", "--run", "other", "--quiet"]) == 0
        shutil.copytree(here / "other" / "checkpoints" / "frozen", folder)
    capsys.readouterr()
    assert main(["verify", "adapted", "--quiet"]) == 3
    said = capsys.readouterr().out
    assert "shared by all: damaged: " in said and "restore that folder from a copy" in said and "resume" not in said
    for arguments in (["resume", "adapted", "train.steps=7"], ["evaluate", "adapted"]):
        assert main([*arguments, "--quiet"]) == 2
        said = capsys.readouterr().err
        assert "frozen parameters of this run are damaged or missing" in said and "Traceback" not in said
        assert str(folder) in said
    assert (here / "adapted" / "checkpoints" / "6").is_dir()


# ---- starting from a base, and reading a trained run


def test_adapters_start_fresh_on_the_averaged_parameters_of_the_base(here):
    session = opened(here, "init.from=base")
    drawn, state = session.program.initialiser(session.plan).result()(), session.fresh()
    jax.tree.map(np.testing.assert_array_equal, state.params, drawn.params)
    jax.tree.map(np.testing.assert_array_equal, state.extra["ema"], drawn.params)
    frozen, trained = layout.snapshot(state.frozen), load_run(here / "base").state
    for name, array in layout.snapshot(trained.params).items():
        np.testing.assert_array_equal(frozen[name], array, err_msg=name)
    session.store.close()


@pytest.mark.slow
def test_adapters_start_from_a_run_that_has_them_and_a_plain_model_refuses_it(here):
    session = opened(here, "init.from=adapted")
    state, known = session.fresh(), load_run(here / "adapted").state
    jax.tree.map(np.testing.assert_array_equal, state.params, known.params)
    jax.tree.map(np.testing.assert_array_equal, state.frozen, known.frozen)
    session.store.close()
    session = opened(here, "init.from=adapted", "model.lora=null")
    with pytest.raises(UserError, match="lora_a: .*not in this model"):
        session.fresh()
    session.store.close()


@pytest.mark.parametrize("changed", ["model.lora.alpha=16", "model.lora.scaling=rank_stabilised"])
def test_adapters_keep_the_scale_and_the_rank_that_they_were_trained_with(changed, here):
    with pytest.raises(UserError, match="the adapters of .* were trained with alpha 32 and scaling standard"):
        opened(here, "init.from=adapted", changed)
    with pytest.raises(UserError, match="the adapters of .* have rank 3") as refused:
        opened(here, "init.from=adapted", changed, "model.lora.rank=5")
    assert "model.lora.rank=3" in refused.value.hint


def test_adapters_beside_random_weights_are_refused(here, capsys):
    for command in ("check",), ("train", "--run", "new"):
        assert main([command[0], "counted.yaml", *ADAPTED, *command[1:]]) == 2
        assert "adapters need a model under them" in capsys.readouterr().err
    assert not (here / "new").exists()


def test_a_trained_run_is_read_with_both_parts_and_scores_as_it_did(here, capsys):
    known = json.loads((here / "adapted" / "scores.json").read_text())
    assert main(["evaluate", "adapted", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"]["nll"] == known["score"]["nll"]
    base = json.loads((here / "base" / "scores.json").read_text())
    assert known["score"]["nll"] != base["score"]["nll"]
    assert any(np.any(leaf) for name, leaf in layout.snapshot(load_run(here / "adapted").state.params).items()
               if name.endswith("_lora_b"))


# ---- a base of 4 bits


WIDE = ["model.width=64", "model.mlp_width=64"]
CODED = [*WIDE, *ADAPTED, "model.lora.base=nf4"]


@pytest.mark.slow
def test_a_base_is_coded_as_it_is_read_and_the_run_resumes_scores_and_counts_as_any(here, capsys):
    assert main(["train", "counted.yaml", *WIDE, "train.steps=2", "--run", "wide", "--quiet"]) == 0
    read = load_run(here / "wide").state.params
    kernels = {name: np.asarray(leaf) for name, leaf in layout.snapshot(read).items()}
    save_file(kernels, here / "wide.safetensors")
    for source in ("wide", "wide.safetensors"):
        session = open_session(load(here / "counted.yaml", [*CODED, f"init.from={source}"]), Run(here / "q"), silent)
        frozen = layout.snapshot(session.fresh().frozen)
        session.store.close()
        coded = [name for name in frozen if name.endswith(nf4.CODES)]
        assert len(coded) == 2 * 7
        for name in coded:
            kernel = name.removesuffix(nf4.CODES)
            known = nf4.encode(kernels[kernel])
            for told, wanted in zip((frozen[name], frozen[kernel + nf4.SCALES]), known, strict=True):
                np.testing.assert_array_equal(told, wanted, err_msg=name)
    assert main(["train", "counted.yaml", *CODED, "init.from=wide", "--run", "coded", "--quiet"]) == 0
    whole, scores = load_run(here / "coded").state, (here / "coded" / "scores.json").read_text()
    known = final_hash(here / "coded")
    resumed_without(here / "coded", 6)
    assert final_hash(here / "coded") == known
    again = load_run(here / "coded").state
    jax.tree.map(np.testing.assert_array_equal, (whole.params, whole.frozen), (again.params, again.frozen))
    capsys.readouterr()
    assert main(["evaluate", "coded", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"]["nll"] == json.loads(scores)["score"]["nll"]
    assert whole.params["stack"]["segments"][0]["mlp"]["up_lora_b"].any()


@pytest.mark.release
def test_a_base_of_4_bits_is_not_read_as_one_of_more(here):
    assert main(["train", "counted.yaml", *WIDE, "train.steps=1", "--run", "wide", "--quiet"]) == 0
    coded = [*CODED, "init.from=wide", "train.steps=2"]
    assert main(["train", "counted.yaml", *coded, "--run", "coded", "--quiet"]) == 0
    for adapters in ([], ADAPTED):
        config = load(here / "counted.yaml", [*WIDE, *adapters, "init.from=coded"])
        session = open_session(config, Run(here / "plain"), silent)
        with pytest.raises(UserError, match="stored in 4 bits"):
            session.fresh()
        session.store.close()
