"""Writes `reference_<family>.npz` with transformers on torch: logits, loss and gradients of the tiny models.

Run it where torch and transformers are installed (`pip install 'aurora_train[parity]'`):

    python tests/parity/make_reference.py [FAMILY ...]
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from families import DOCUMENTS, FAMILIES, draw_weights, of_documents, rows_of

HERE = Path(__file__).parent


def reference(family: str) -> dict:
    """{"shapes": name -> shape, "logits": [tokens of DOCUMENTS, VOCAB], "loss", "gradients": name -> array} in float32,
    attention in plain form."""
    settings = dict(FAMILIES[family])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().train()
    trained = dict(model.named_parameters())
    weights = draw_weights(family, {name: tuple(p.shape) for name, p in trained.items()})
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(torch.from_numpy(weights[name]))
    rows = rows_of(family)
    tokens, targets, positions = (torch.from_numpy(x).long() for x in (rows.tokens, rows.targets, rows.positions))
    # Every document alone, but for the one behind padding, which shares a batch with the longest.
    found = [model(tokens[row, None, start:stop], use_cache=False).logits[0] for row, start, stop in DOCUMENTS[:-1]]
    last, start, stop = DOCUMENTS[-1]
    both = [0, last]
    padded = {"attention_mask": torch.from_numpy(rows.weights[both]).long(), "position_ids": positions[both]}
    found.append(model(tokens[both], use_cache=False, **padded).logits[1, start:stop])
    logits = torch.cat(found)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(of_documents(rows.targets)).long())
    loss.backward()
    return {
        "shapes": {name: tuple(p.shape) for name, p in trained.items()},
        "logits": logits.detach().numpy(),
        "loss": loss.item(),
        "gradients": {name: p.grad.numpy() for name, p in trained.items()},
    }


if __name__ == "__main__":
    for family in sys.argv[1:] or FAMILIES:
        found = reference(family)
        arrays = {f"gradient/{name}": g for name, g in found["gradients"].items()}
        path = HERE / f"reference_{family}.npz"
        np.savez_compressed(path, logits=found["logits"], loss=np.float32(found["loss"]), **arrays)
        print(family, f"{found['loss']:.4f}", f"{path.stat().st_size:,} bytes", transformers.__version__)
