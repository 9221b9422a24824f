"""LeRobot's ACT on torch: a program for a Python that has `lerobot`, whose loss it writes with all that decides it.

    $AURORA_LEROBOT_PYTHON tests/parity/lerobot_act.py OUT.npz [--seed N]

The file has the weights, a batch whose last chunks are padded, the noise of the latent, the loss and its two parts, the
gradients and the chunk that the policy would do. `tests/parity/test_lerobot_act.py` compares ours with it.
"""

import sys

import numpy as np

# The sizes of the network and of the batch; the first two vectors are state and environment.
SIZES = {"state": 3, "environment": 4, "actions": 2, "chunk": 6, "width": 16, "heads": 2, "mlp": 24, "layers": 2,
         "decoder_layers": 2, "posterior_layers": 2, "latent": 5, "batch": 4}  # fmt: skip


def make_policy(sizes: dict, kl_weight: float = 10.0):
    """lerobot's ACTPolicy without images and dropout, in float32, with the weights that it draws itself."""
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    inputs = {"observation.state": PolicyFeature(FeatureType.STATE, (sizes["state"],)),
              "observation.environment_state": PolicyFeature(FeatureType.ENV, (sizes["environment"],))}  # fmt: skip
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


def main(out: str, seed: int = 0) -> None:
    import torch

    policy, batch, draws = make_policy(SIZES), make_batch(SIZES, seed), np.random.default_rng(seed + 1)
    for parameter in policy.parameters():  # norms and biases too, which begin as ones and zeros
        parameter.data += torch.from_numpy(draws.normal(size=tuple(parameter.shape)).astype(np.float32)) * 0.1
    torch.randn_like = lambda like: torch.from_numpy(batch["noise"])
    policy.train()
    loss, parts = policy(as_theirs(batch))
    loss.backward()
    found = {f"weight/{name}": p.detach().numpy() for name, p in policy.named_parameters()}
    found |= {f"gradient/{name}": p.grad.numpy() for name, p in policy.named_parameters()}
    chunk = policy.predict_action_chunk(as_theirs(batch)).numpy()
    np.savez_compressed(out, **found, **batch, chunk=chunk, loss=loss.item(), l1=parts["l1_loss"], kl=parts["kld_loss"])
    print(f"loss {loss.item():.6f}: {parts}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[3]) if len(sys.argv) > 3 else 0)
