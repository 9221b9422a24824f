"""ACT against LeRobot's on torch: the same weights, batch and noise of the latent give the same loss and gradients.

The stored figures are those of lerobot 0.4.4 (`lerobot_act.py`). The release tier makes them anew, with other numbers,
if AURORA_LEROBOT_PYTHON names a Python that has lerobot: its pins do not fit into this environment.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from lerobot_act import SIZES  # noqa: E402

STORED = {name: Path(__file__).parent / f"reference_lerobot_act{tail}.npz"
          for name, tail in (("state", ""), ("camera", "_camera"))}  # fmt: skip
LOSS, GRADIENT = 1e-4, 1e-3  # of a gradient: a share of its largest entry
_BLOCK = {
    "self_attn.out_proj.weight": "attention.out", "self_attn.out_proj.bias": "attention.out_bias",
    "linear1.weight": "mlp.up", "linear1.bias": "mlp.up_bias", "linear2.weight": "mlp.down",
    "linear2.bias": "mlp.down_bias", "norm1.weight": "attn_sum_norm.scale", "norm1.bias": "attn_sum_norm.bias",
    "norm2.weight": "mlp_sum_norm.scale", "norm2.bias": "mlp_sum_norm.bias",
}  # fmt: skip
# In the decoder a layer of theirs is two rows of our table: attention to itself, then to what was read, with the MLP.
_FIRST = {name: f"blocks.0.{_BLOCK[name]}" for name in _BLOCK if name.startswith(("self_attn", "norm1"))}
_SECOND = {name.replace("self_attn", "multihead_attn"): f"blocks.1.{ours}" for name, ours in _BLOCK.items()
           if name.startswith(("self_attn", "linear"))}  # fmt: skip
_SECOND |= {f"norm{n}.{theirs}": f"blocks.1.{ours}_sum_norm.{kind}" for n, ours in ((2, "attn"), (3, "mlp"))
            for theirs, kind in (("weight", "scale"), ("bias", "bias"))}  # fmt: skip
_MAPS = {
    "vae_encoder_robot_state_input_proj": "posterior.state", "vae_encoder_action_input_proj": "posterior.action",
    "vae_encoder_latent_output_proj": "posterior.out", "encoder_robot_state_input_proj": "trunk.state.0",
    "encoder_env_state_input_proj": "trunk.state.1", "encoder_latent_input_proj": "style", "action_head": "trunk.head",
    "encoder_img_feat_input_proj": "trunk.vision",
}  # fmt: skip
_REST = {
    "vae_encoder_cls_embed.weight": "posterior.first", "encoder_1d_feature_pos_embed.weight": "trunk.places",
    "decoder_pos_embed.weight": "trunk.chunk_places", "decoder.norm.weight": "trunk.decoder.final_norm.scale",
    "decoder.norm.bias": "trunk.decoder.final_norm.bias",
}  # fmt: skip
_STACKS = {"vae_encoder": ("posterior.blocks", _BLOCK, ("",)), "encoder": ("trunk.encoder", _BLOCK, ("",)),
           "decoder": ("trunk.decoder", _FIRST | _SECOND, ("blocks.0.", "blocks.1."))}  # fmt: skip


def as_ours(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their parameters, or gradients, under our names and in our shapes."""
    ours = {}
    for name, array in theirs.items():
        array = array[..., 0, 0] if array.ndim == 4 else array  # a convolution of 1 x 1
        array = array.T if array.ndim == 2 else array
        module, _, kind = name.rpartition(".")
        if module in _MAPS:
            ours[f"{_MAPS[module]}.{'kernel' if kind == 'weight' else 'bias'}"] = array
        elif name in _REST:
            ours[_REST[name]] = array.T if array.ndim == 2 else array  # tables of places, a row each
        else:
            stack, _, layer, inside = name.split(".", 3)
            place, names, blocks = _STACKS[stack]
            unit = f"{place}.stack.units.{int(layer):04d}"
            if "in_proj" in inside:  # query, key and value side by side
                block, tail = blocks[inside.startswith("multihead")], "" if "weight" in inside else "_bias"
                for part, values in zip(("query", "key", "value"), np.split(array, 3, -1), strict=True):
                    ours[f"{unit}.{block}attention.{part}{tail}"] = values
            else:
                ours[f"{unit}.{names[inside]}"] = array
    return ours


def ours_on(found, monkeypatch):
    """(loss, l1, kl, gradients by our names, chunk) of our ACT with their weights on their batch."""
    from flax import nnx

    from aurora_train.checkpoint import layout
    from robot import act, trunk
    from robot.blocks import Affine
    from robot.settings import ModelConfig
    from robot.trunk import Shape

    config = ModelConfig(
        kind="act", width=SIZES["width"], heads=SIZES["heads"], mlp_width=SIZES["mlp"], layers=SIZES["layers"],
        decoder_layers=SIZES["decoder_layers"], posterior_layers=SIZES["posterior_layers"], latent=SIZES["latent"],
        activation="relu", norm_place="sum", kl_weight=10.0,
    )  # fmt: skip
    cameras, size = (), SIZES["width"]
    seen = {"state": np.concatenate([found["state"], found["environment"]], 1)}
    if "features" in found.files:  # of their ResNet: our network of pictures is the map that follows it there

        class Projection(Affine):
            def __call__(self, x, keys=None):
                return super().__call__(x)

        cameras, seen["image.above"] = (("above", *found["features"].shape[1:3]),), found["features"]
        channels = found["features"].shape[3]
        monkeypatch.setattr(trunk, "make_vision", lambda config, cameras, dtype, rngs: Projection(channels, size, rngs))
        monkeypatch.setattr(trunk, "sinusoid_2d", lambda *sizes: found["places"].reshape(-1, size))
    shape = Shape((SIZES["state"], SIZES["environment"]), cameras, 0, SIZES["chunk"], SIZES["actions"])
    weights = as_ours({name[7:].removeprefix("model."): found[name] for name in found.files if name[:7] == "weight/"})
    weights |= {"trunk.camera_places": np.zeros((1, size), np.float32)} if cameras else {}  # theirs has none
    graph, state = nnx.split(act.Act(config, shape, "float32", nnx.Rngs(0)))
    drawn = nnx.to_pure_dict(state)
    assert layout.snapshot(drawn).keys() == weights.keys()
    params = layout.assemble(weights, drawn, jax.tree.map(lambda leaf: leaf.sharding, drawn))
    monkeypatch.setattr(act, "style_noise", lambda keys, size: found["noise"])

    def merged(params):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def mean(params):
        losses, metrics = merged(params).losses(seen, found["action"], found["padded"], jax.random.split(
            jax.random.key(0), len(found["action"])))  # fmt: skip
        return losses.mean(), {name: total / weight for name, (total, weight) in metrics.items()}

    (loss, parts), gradients = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    chunk = jax.jit(lambda params: merged(params).actions(seen))(params)
    return float(loss), float(parts["l1"]), float(parts["kl"]), layout.snapshot(gradients), np.asarray(chunk)


def assert_alike(file: Path, monkeypatch):
    found = np.load(file)
    loss, l1, kl, gradients, chunk = ours_on(found, monkeypatch)
    theirs = as_ours({name[9:].removeprefix("model."): found[name] for name in found.files if name[:9] == "gradient/"})
    # Some gradients are zero but for rounding: that of a key's bias, which adds the same to all scores of a query, and
    # those of the decoder's first attention to itself, whose values are all alike because it begins with zeros.
    nothing = 1e-6 * max(np.abs(g).max() for g in theirs.values())
    shares = {name: np.abs(gradients[name] - g).max() / np.abs(g).max() for name, g in theirs.items()
              if np.abs(g).max() > nothing}  # fmt: skip
    silent = theirs.keys() - shares.keys()
    assert all(name.endswith("key_bias") or "decoder.stack.units.0000.blocks.0.attention" in name for name in silent)
    print(f"loss {loss:.6f}, off by {abs(loss - found['loss']):.1e}; chunk by "
          f"{np.abs(chunk - found['chunk']).max():.1e}; gradients by {max(shares.values()):.1e} of their largest, "
          f"{len(silent)} of {len(theirs)} are zero")  # fmt: skip
    assert found["padded"].any()
    assert max(abs(loss - found["loss"]), abs(l1 - found["l1"]), abs(kl - found["kl"])) <= LOSS
    assert np.abs(chunk - found["chunk"]).max() <= LOSS
    assert all(np.abs(gradients[name]).max() <= nothing for name in silent) and max(shares.values()) <= GRADIENT


@pytest.mark.slow
@pytest.mark.parametrize("sees", STORED)
def test_act_is_lerobots_by_its_stored_figures(sees, monkeypatch):
    assert_alike(STORED[sees], monkeypatch)


@pytest.mark.release
@pytest.mark.parametrize("sees", STORED)
def test_act_is_lerobots_as_it_computes_now(sees, monkeypatch, tmp_path):
    python = os.environ.get("AURORA_LEROBOT_PYTHON")
    if python is None:
        pytest.skip("AURORA_LEROBOT_PYTHON names no Python that has lerobot")
    program, out = Path(__file__).parent / "lerobot_act.py", tmp_path / "theirs.npz"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    camera = ["--camera"] if sees == "camera" else []
    subprocess.run([python, str(program), str(out), "--seed", "7", *camera], check=True, env=environment, timeout=300)
    assert_alike(out, monkeypatch)
