"""TRL's trainers over PEFT's adapters on torch: their own preparation, collator, loss and backward pass, in float32.

The adapters are drawn by numpy under PEFT's names. `ours` says, independently of `aurora_train.interop`, which of our
parameters each of them is.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

RANK, ALPHA = 4, 8
_OURS = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "attention.out", "gate": "mlp.gate",
         "up": "mlp.up", "down": "mlp.down"}  # fmt: skip
_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.\w+\.(\w+)_proj\.lora_([AB])\.default\.weight")


def ours(name: str) -> str:
    """Our name of a parameter of PEFT's, whose matrix is the transpose of ours."""
    layer, kernel, letter = _NAME.fullmatch(name).groups()
    return f"stack.units.{int(layer):04d}.{_OURS[kernel]}_lora_{letter.lower()}"


class Side:
    """One trainer with every adapter matrix drawn, so that both of a pair have a gradient.

    `kind`: "SFT", "DPO" or "KTO". `model`: transformers' model, which is changed. `settings`: of the trainer's config.
    `spread`: standard deviation of the adapters. `adapters`: float32 arrays by our names.
    """

    def __init__(self, kind: str, model, tokenizer, rows: list[dict], folder: Path, spread: float = 0.125, **settings):
        import torch
        import trl
        from datasets import Dataset
        from peft import LoraConfig

        args = getattr(trl, f"{kind}Config")(
            output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_length=None,
            logging_strategy="no", **settings,
        )  # fmt: skip
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        self.trainer = getattr(trl, f"{kind}Trainer")(
            model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
        )
        self.trainer.current_gradient_accumulation_steps = 1
        draws = np.random.default_rng(0)
        self._trained = {name: p for name, p in self.trainer.model.named_parameters() if p.requires_grad}
        self.adapters = {}
        for name, parameter in self._trained.items():
            array = (draws.normal(size=tuple(parameter.shape)) * spread).astype(np.float32)
            parameter.data = torch.from_numpy(array.copy())
            self.adapters[ours(name)] = np.ascontiguousarray(array.T)

    def examples(self, indices) -> list[dict]:
        """Rows as its `_prepare_dataset` left them."""
        return [self.trainer.train_dataset[int(index)] for index in indices]

    def step(self, examples: list[dict]) -> tuple[float, dict[str, float], dict[str, np.ndarray]]:
        """(loss, what it logs, gradients by our names) of one batch: all that `train` does but the update."""
        trainer = self.trainer
        trainer.model.zero_grad(set_to_none=True)
        batches, items = trainer.get_batch_samples(iter([trainer.data_collator(examples)]), 1, trainer.args.device)
        loss = trainer.training_step(trainer.model, batches[0], items)
        logged = {name: values[-1] for name, values in trainer._metrics["train"].items() if values}
        found = {ours(name): parameter.grad.numpy().T.copy() for name, parameter in self._trained.items()}
        return float(loss), logged, found
