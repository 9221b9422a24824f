"""Import, export and proof take at most the weights as they are kept and 1.5 GB, seen from outside each process.

`pytest -m release -s tests/interop/test_memory.py` does it with 1.1 GB and with the shape of Llama 3 8B, and writes 16
GB to the disk.
"""

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from open_models import _BYTES, END

from aurora_train.interop import families
from aurora_train.interop.placing import our_shapes, their_shapes
from aurora_train.interop.tokenizer_files import tokenizer_json
from aurora_train.nn.decoder_config import DecoderConfig

GB = 10**9
COMMON = {
    "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "eos_token_id": 256,
    "bos_token_id": 256, "pad_token_id": 256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
SHAPES = {
    "1.1 GB": COMMON | {"hidden_size": 2048, "num_hidden_layers": 6, "intermediate_size": 8192, "vocab_size": 48000},
    "Llama 3 8B": COMMON | {
        "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 128256},
}  # fmt: skip
BESIDE = 1.5 * GB  # the bound, above what is kept
RANDOM_ROWS = 1000  # of the tables; of a kernel in the first layer, all


def sparse_model(folder: Path, settings: dict) -> int:
    """A model of zeros that takes no room on the disk, but for the first layer, the last norm and some rows of the
    tables, which are random. Returns the bytes of its weights in bfloat16."""
    folder.mkdir()
    table = families.of(settings, "here")
    config = DecoderConfig(**families.read_shape(settings, table, "here"))
    shapes = their_shapes(table, our_shapes(config, settings["vocab_size"]), config.heads)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            if ".layers." not in name or ".layers.0." in name:
                values = random.standard_normal((min(shape[0], RANDOM_ROWS if "layers" not in name else shape[0]),
                                                 *shape[1:]), np.float32)  # fmt: skip
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write((values / 50).astype(ml_dtypes.bfloat16).tobytes())
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(tokenizer_json(_BYTES))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return end


def peak_of(*arguments) -> tuple[int, str]:
    """(the largest RssAnon of a Python process in bytes, seen every 5 ms, what it printed). Fails if it fails."""
    child = subprocess.Popen([sys.executable, *map(str, arguments)], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"})  # fmt: skip
    seen = [0]

    def watch():
        while child.returncode is None:
            try:
                found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{child.pid}/status").read_text())
            except OSError:
                return
            seen.append(1024 * int(found[1]) if found else 0)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = child.communicate()
    watcher.join()
    assert child.returncode == 0, err[-3000:]
    return max(seen), out


def aurora(*arguments) -> int:
    peak, _ = peak_of("-m", "aurora_train.cli.main", *arguments)
    print(f"{arguments[0]}: at most {peak / GB:.2f} GB")
    return peak


# Reads a source into parameters of a format, as a start from it does, and prints the bytes that it keeps. "nf4": with
# adapters.
STARTED = """
import sys
import jax
import jax.numpy as jnp
from aurora_train.checkpoint import layout
from aurora_train.config import load_values
from aurora_train.machine.precision import settled
from aurora_train.machine.profile import prepare_environment
from aurora_train.nn.lora import is_adapter
from aurora_train.origin.parents import inherited_facts, parents_of
from aurora_train.origin.weights import parameters_from
from aurora_train.train import session
from aurora_train.train.starting import read_whole
model = {"from": sys.argv[1]} | ({"lora": {"rank": 4, "base": "nf4"}} if sys.argv[2] == "nf4" else {})
values = {"recipe": "language_model", "model": model, "train": {"precision": "bfloat16"}}
values |= {"optimizer": {"master": sys.argv[2]}} if sys.argv[2] != "nf4" else {}
config = load_values(values, "here")
prepare_environment(config)
config = settled(config)
parents = parents_of(config, {})
recipe = session.make_recipe(config)
recipe.inherited = inherited_facts(config, parents)
recipe.use(recipe.inherited)
blueprint, _ = read_whole(config, recipe)
tree = {"params": blueprint.state.params, "frozen": blueprint.state.frozen}
places = {"params": blueprint.shardings.params, "frozen": blueprint.shardings.frozen}
drawn = {name: jnp.zeros(one.shape, one.dtype) for name, one in layout.abstract(tree, places).items()
         if is_adapter(name)}
kept = parameters_from(parents, blueprint, drawn)
print(sum(leaf.nbytes for leaf in jax.tree.leaves(kept)))
"""


@pytest.mark.release
@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_comes_in_and_goes_out_within_the_bound(shape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))
    weights = sparse_model(Path("open"), SHAPES[shape])
    print(f"\n{shape}: {weights / GB:.2f} GB in bfloat16")
    assert aurora("import", "open", "--to", "base") <= weights + BESIDE
    assert aurora("export", "base", "--to", "out") <= weights + BESIDE
    assert aurora("verify", "out") <= weights + BESIDE
    proof = json.loads(Path("out/proof.json").read_text())
    assert proof["kind"] == "round trip" and proof["dtype"] == "bfloat16" and proof["difference"] == 0
    for form in ("nf4", "bfloat16"):
        peak, said = peak_of("-c", STARTED, "open", form)
        print(f"started in {form}: at most {peak / GB:.2f} GB, of which {int(said) / GB:.2f} GB are kept")
        assert int(said) <= weights and peak <= int(said) + BESIDE
