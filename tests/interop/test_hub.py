"""`hub:owner/name`: downloaded from a real HTTP server with --online, and read from the cache without it."""

import json
import os
import shutil

import pytest
from hub_server import Hub, commit_of
from kit import in_process as aurora
from open_models import write_model
from safetensors.numpy import load_file, save_file
from test_sources import adapter

import aurora_train
from aurora_train.config import load_values
from aurora_train.interop import hub as hubs

CONFIG = """
recipe: language_model
model: {from: "hub:lab/tiny"}
data: {source: texts, sequence: 32, holdout_test: 0.3, holdout_validation: 0.0}
train: {steps: 1, batch: 2, precision: float32}
evaluate: {final: false}
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the model lab/tiny, the current folder `tmp_path`, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", dtype="bfloat16")
    (tmp_path / "tiny" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "tiny" / "pytorch_model.bin").write_bytes(b"a pickle beside it")
    (tmp_path / "tiny" / "tokenizer.model").write_bytes(b"not read")
    with Hub({"lab/tiny": tmp_path / "tiny"}).running() as found:
        monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_ENDPOINT", found.endpoint)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as every verb sets it; --online wins
        yield found


def snapshot(tmp_path, commit):
    return tmp_path / "cache" / "hub" / "models--lab--tiny" / "snapshots" / commit


def test_a_model_is_downloaded_once_and_read_without_the_network_afterwards(hub, tmp_path, capsys):
    assert aurora("import", "hub:lab/tiny", "--to", "run") == 2
    said = capsys.readouterr().err
    assert "hub:lab/tiny is on the network, and the network is off" in said and "--online" in said
    assert not hub.requests and not (tmp_path / "run").exists()
    assert aurora("import", "hub:lab/tiny", "--to", "run", "--online") == 0
    commit, folder = commit_of(tmp_path / "tiny"), snapshot(tmp_path, commit_of(tmp_path / "tiny"))
    kept = ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(kept)
    assert sorted(name for name, _ in hub.requests) == sorted(kept)
    parent = json.loads((tmp_path / "run" / "provenance.json").read_text())["parent"]
    assert (parent["hub"], parent["revision"], parent["from"]) == ("lab/tiny", commit, str(folder))
    hub.server.shutdown()
    hub.server.server_close()
    assert aurora("import", "hub:lab/tiny", "--to", "again") == 0
    assert aurora("import", f"hub:lab/tiny@{commit}", "--to", "pinned") == 0
    assert aurora("export", "hub:lab/tiny", "--to", "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: "lab/tiny"' in card and f"Started from: `lab/tiny` at revision {commit}" in card
    assert 'license: "mit"' in card and str(tmp_path) not in card
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert aurora("import", "hub:lab/tiny", "--to", "third", "--online") == 2  # no silent step back to the copy
    said = capsys.readouterr().err
    assert "hub:lab/tiny cannot be downloaded" in said and f"without --online the copy of {commit[:12]}" in said
    assert "is there a network? HF_ENDPOINT" in said and "hub:lab/tiny: hub:lab/tiny" not in said


def test_a_download_that_broke_off_is_continued_where_it_ended(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # 10 MB, of which the last is lost
    hub.breaks_after = 1000
    assert aurora("import", "hub:lab/tiny", "--to", "run", "--online") == 2
    said = capsys.readouterr().err
    assert "cannot be downloaded" in said and "the same command continues the download" in said
    commit = commit_of(tmp_path / "tiny")
    part = snapshot(tmp_path, f"{commit}.part") / "model.safetensors.part"
    assert part.stat().st_size == 1000 and not snapshot(tmp_path, commit).exists()
    assert aurora("import", "hub:lab/tiny", "--to", "run") == 2
    assert "a download of it was broken off" in capsys.readouterr().err
    hub.breaks_after, hub.requests[:] = None, []
    assert aurora("import", "hub:lab/tiny", "--to", "run", "--online") == 0
    assert hub.requests[0] == ("model.safetensors", "bytes=1000-")
    assert "config.json" not in dict(hub.requests)  # it was whole
    whole = (tmp_path / "tiny" / "model.safetensors").read_bytes()
    assert (snapshot(tmp_path, commit) / "model.safetensors").read_bytes() == whole


def test_a_new_commit_is_read_only_by_a_command_that_may_ask(hub, tmp_path):
    assert aurora("import", "hub:lab/tiny", "--to", "one", "--online") == 0
    path = tmp_path / "tiny" / "model.safetensors"
    before = commit_of(tmp_path / "tiny")
    save_file({name: array * 2 for name, array in load_file(path).items()}, path, metadata={"format": "pt"})
    assert hubs.copied("hub:lab/tiny", online=False) == snapshot(tmp_path, before)
    assert hubs.copied("hub:lab/tiny", online=True) == snapshot(tmp_path, commit_of(tmp_path / "tiny"))
    assert hubs.copied(f"hub:lab/tiny@{before}", online=False) == snapshot(tmp_path, before)


def test_a_config_that_names_it_is_refused_at_the_key_while_the_network_is_off(hub, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    assert aurora("check", "tiny.yaml") == 2
    said = capsys.readouterr().err
    assert "tiny.yaml:3" in said and "the network is off" in said and "data.online=true" in said


@pytest.mark.release
def test_a_run_starts_from_it_and_does_not_need_the_cache_afterwards(hub, tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} and {number + 1} make {2 * number + 1}. " * 9)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    aurora_train.train("tiny.yaml", ["data.online=true"], run="run", quiet=True)
    parent = json.loads((tmp_path / "run" / "provenance.json").read_text())["parent"]
    assert (parent["hub"], parent["revision"]) == ("lab/tiny", commit_of(tmp_path / "tiny"))
    assert aurora("generate", "hub:lab/tiny", "--max-tokens", 1) == 0
    shutil.rmtree(tmp_path / "cache" / "hub")
    assert aurora("generate", "run", "--max-tokens", 1) == 0
    assert aurora("resume", "run", "train.steps=2", "--quiet") == 0


def test_an_adapter_brings_its_base(hub, tmp_path):
    (tmp_path / "m").mkdir()
    folder, _ = adapter(tmp_path, base_model_name_or_path="lab/tiny", revision=commit_of(tmp_path / "tiny"))
    hub.models["lab/adapter"] = folder
    assert aurora("import", "hub:lab/adapter", "--to", "run", "--online") == 0
    assert snapshot(tmp_path, commit_of(tmp_path / "tiny")).is_dir()
    assert aurora("import", "hub:lab/adapter", "--to", "again") == 0


def test_an_adapter_in_a_folder_brings_its_base_and_what_names_no_base_is_refused(hub, tmp_path, capsys):
    (tmp_path / "m").mkdir()
    folder, _ = adapter(tmp_path, base_model_name_or_path="lab/tiny")
    assert aurora("import", str(folder), "--to", "run") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "base lab/tiny is not here" in said and "`aurora import hub:lab/tiny --to RUN --online` downloads it" in said
    assert aurora("import", str(folder), "--to", "run", "--online") == 0
    config = json.loads((folder / "adapter_config.json").read_text())
    for base, revision, what in (
        ("lab/tiny", "../x", '`revision` is "../x", which names none of lab/tiny'), ("lab/tiny", 3, "`revision` is 3"),
        ("lab--tiny/x", None, "base lab--tiny/x is not here"),  # in the cache, the folder of lab/tiny--x
        ("x" * 300 + "/y", None, "is not here"),
    ):
        changed = config | {"base_model_name_or_path": base, "revision": revision}
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        assert aurora("import", str(folder), "--to", "none", "--online") == 2
        assert what in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "none").exists()


def test_a_token_is_not_sent_to_the_store_of_another_address(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Hub({"lab/tiny": tmp_path / "tiny"}).running() as store:
        hub.store = store.endpoint
        assert aurora("import", "hub:lab/tiny", "--to", "run", "--online") == 0
        assert store.tokens == [None] and set(hub.tokens) == {"Bearer hf_secret"}


BAD = {
    "no owner": ("hub:tiny", "names no model on a hub"),
    "a path": ("hub:../../etc/x", "names no model on a hub"),
    "a revision that climbs": ("hub:lab/tiny@../x", "names no model on a hub"),
    "a name as no hub allows": ("hub:a-/-b", "names no model on a hub"),
    "a name too long": ("hub:lab/" + "x" * 300, "names no model on a hub"),
    "a revision too long": ("hub:lab/tiny@" + "x" * 300, "names no model on a hub"),
    "nobody has it": ("hub:lab/other", "the hub has no model lab/other"),
    "no such revision": ("hub:lab/tiny@v9", "lab/tiny has no revision v9"),
    "another content": ("hub:lab/tiny", "config.json of hub:lab/tiny is not what the hub states: its sha1 differs"),
    "other weights": ("hub:lab/tiny", "model.safetensors of hub:lab/tiny is not what the hub states: its sha256"),
    "a pickle": ("hub:lab/tiny", "its weights are pytorch_model.bin, a pickle"),
    "no weights": ("hub:lab/tiny", "there is no *.safetensors in it"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_downloaded_is_one_message_and_leaves_nothing(case, hub, tmp_path, capsys):
    named, said = BAD[case]
    hub.lies = {"another content": "config.json", "other weights": "model.safetensors"}.get(case)
    if case in ("a pickle", "no weights"):
        os.remove(tmp_path / "tiny" / "model.safetensors")
    if case == "no weights":
        os.remove(tmp_path / "tiny" / "pytorch_model.bin")
    assert aurora("import", named, "--to", "run", "--online") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert not any((tmp_path / "cache").rglob("model.safetensors"))


def test_no_more_is_downloaded_than_the_disk_holds(hub, monkeypatch, capsys):
    full = type(shutil.disk_usage("."))(10**6, 10**6 - 10, 10)
    monkeypatch.setattr(hubs.shutil, "disk_usage", lambda path: full)
    assert aurora("import", "hub:lab/tiny", "--to", "run", "--online") == 2
    assert "GB are free" in capsys.readouterr().err and not hub.requests


def test_a_start_by_init_from_says_how_a_hub_is_named():
    config = load_values({"recipe": "language_model", "name": "new", "init": {"from": "hub:lab/tiny"}}, "new")
    with pytest.raises(aurora_train.UserError, match="model.from=hub:owner/name starts from it"):
        aurora_train.check.intent.refuse_missing_start(config)
