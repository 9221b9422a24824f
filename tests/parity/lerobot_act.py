"""LeRobot's ACT on torch: a program for a Python that has `lerobot`, whose loss it writes with all that decides it.

    $AURORA_LEROBOT_PYTHON tests/parity/lerobot_act.py OUT.npz [--seed N] [--camera]

The file has the weights, a batch whose last chunks are padded, the noise of the latent, the loss and its two parts, the
gradients and the chunk that the policy would do. With `--camera` the policy sees a picture, and the file has what its
ResNet made of it and the places that it gave these features: ours reads pictures by other networks, and all that
follows is compared. `tests/parity/test_lerobot_act.py` compares ours with it.
"""

import sys

import numpy as np

# The sizes of the network and of the batch; the first two vectors are state and environment.
SIZES = {"state": 3, "environment": 4, "actions": 2, "chunk": 6, "width": 16, "heads": 2, "mlp": 24, "layers": 2,
         "decoder_layers": 2, "posterior_layers": 2, "latent": 5, "batch": 4}  # fmt: skip


CAMERA, PICTURE = "observation.images.above", 64


def make_policy(sizes: dict, kl_weight: float = 10.0, camera: bool = False):
    """lerobot's ACTPolicy without dropout, in float32, with the weights that it draws itself."""
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    inputs = {"observation.state": PolicyFeature(FeatureType.STATE, (sizes["state"],)),
              "observation.environment_state": PolicyFeature(FeatureType.ENV, (sizes["environment"],))}  # fmt: skip
    if camera:
        inputs |= {CAMERA: PolicyFeature(FeatureType.VISUAL, (3, PICTURE, PICTURE))}
    config = ACTConfig(
        input_features=inputs, output_features={"action": PolicyFeature(FeatureType.ACTION, (sizes["actions"],))},
        chunk_size=sizes["chunk"], n_action_steps=1, dim_model=sizes["width"], n_heads=sizes["heads"],
        dim_feedforward=sizes["mlp"], n_encoder_layers=sizes["layers"], n_decoder_layers=sizes["decoder_layers"],
        n_vae_encoder_layers=sizes["posterior_layers"], latent_dim=sizes["latent"], dropout=0.0, kl_weight=kl_weight,
        device="cpu", pretrained_backbone_weights=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return ACTPolicy(config)


def make_batch(sizes: dict, seed: int) -> dict[str, np.ndarray]:
    """Standard normal arrays under our names, and `noise` of the latent. Every second chunk ends in padding."""
    draws, count = np.random.default_rng(seed), sizes["batch"]
    arrays = {"state": (count, sizes["state"]), "environment": (count, sizes["environment"]),
              "action": (count, sizes["chunk"], sizes["actions"]), "noise": (count, sizes["latent"])}  # fmt: skip
    made = {name: draws.normal(size=shape).astype(np.float32) for name, shape in arrays.items()}
    real = np.where(np.arange(count) % 2, sizes["chunk"], 1 + np.arange(count) % sizes["chunk"])
    return made | {"padded": np.arange(sizes["chunk"]) >= real[:, None]}


def as_theirs(batch: dict[str, np.ndarray]) -> dict:
    import torch

    names = {"observation.state": "state", "observation.environment_state": "environment", "action": "action",
             "action_is_pad": "padded"}  # fmt: skip
    return {theirs: torch.from_numpy(batch[ours]) for theirs, ours in names.items()}


def scaled(made: dict):
    """The features of a ResNet with drawn weights, of deviation 1: as they are, they would drown what else is seen."""
    return made["feature_map"] / made["feature_map"].std()


def main(out: str, seed: int, camera: bool) -> None:
    import torch

    policy, batch, draws = make_policy(SIZES, camera=camera), make_batch(SIZES, seed), np.random.default_rng(seed + 1)
    given, seen = as_theirs(batch), {}
    if camera:
        shape = (SIZES["batch"], 3, PICTURE, PICTURE)
        given[CAMERA] = torch.from_numpy(draws.random(size=shape).astype(np.float32))
        policy.model.backbone.register_forward_hook(lambda *of: seen.update(features=scaled(of[2])) or
                                                    {"feature_map": seen["features"]})  # fmt: skip
        policy.model.encoder_cam_feat_pos_embed.register_forward_hook(lambda *of: seen.update(places=of[2]))
    for parameter in policy.parameters():  # norms and biases too, which begin as ones and zeros
        parameter.data += torch.from_numpy(draws.normal(size=tuple(parameter.shape)).astype(np.float32)) * 0.1
    torch.randn_like = lambda like: torch.from_numpy(batch["noise"])
    policy.train()
    loss, parts = policy(dict(given))
    loss.backward()
    compared = [(name, p) for name, p in policy.named_parameters() if "backbone" not in name]
    found = {f"weight/{name}": p.detach().numpy() for name, p in compared}
    found |= {f"gradient/{name}": p.grad.numpy() for name, p in compared}
    found |= {name: array.detach().numpy().transpose(0, 2, 3, 1) for name, array in seen.items()}  # channels last
    chunk = policy.predict_action_chunk(dict(given)).numpy()
    np.savez_compressed(out, **found, **batch, chunk=chunk, loss=loss.item(), l1=parts["l1_loss"], kl=parts["kld_loss"])
    print(f"loss {loss.item():.6f}: {parts}")


if __name__ == "__main__":
    rest = sys.argv[2:]
    main(sys.argv[1], int(rest[rest.index("--seed") + 1]) if "--seed" in rest else 0, "--camera" in rest)
