"""The peer of tune_peers.py: TRL's SFTTrainer over PEFT's adapters, in a process of its own.

Run as a script it answers each line of stdin as torch_peer.py does: to seconds, with the median seconds of a step over
as long; to "steps", with how many it has taken. It is `trainer.train()` itself, which waits for a line at the end of a
step. Needs torch, trl and peft, and nothing of ours.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sides import Side, peak_rss

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Work:
    """What TRL is to train.

    `rows`: a file of JSON lines with input_ids, labels and seq_lengths. `checkpointing`: each layer is recomputed, the
    default of SFTConfig. The base is loaded in `precision`; in bfloat16 the trainer's autocast is on, as by default.
    """

    model: str
    rows: str
    batch: int
    precision: str
    checkpointing: bool
    rank: int = 16


def trl_side(work: Work, **options) -> Side:
    """TRL, in a process of its own. `options`: those of Side."""
    return Side(__file__, json.dumps(asdict(work)), **options)


def make_trainer(work: Work, folder: str, callback):
    """SFTTrainer on rows that are packed already. Rows of one conversation each need no padding-free collator."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in Path(work.rows).read_text().splitlines()]
    packed = any(len(row["seq_lengths"]) > 1 for row in rows)
    if not packed:
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    args = SFTConfig(
        output_dir=folder, use_cpu=True, bf16=work.precision == "bfloat16", report_to="none", disable_tqdm=True,
        per_device_train_batch_size=work.batch, max_steps=10**6, max_length=None, padding_free=packed,
        gradient_checkpointing=work.checkpointing, dataset_kwargs={"skip_prepare_dataset": True}, learning_rate=5e-4,
        lr_scheduler_type="constant", save_strategy="no", logging_steps=1, dataloader_drop_last=True,
    )  # fmt: skip
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(work.model, dtype=getattr(torch, work.precision)), args=args,
        train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(work.model),
        peft_config=LoraConfig(r=work.rank, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"),
        callbacks=[callback],
    )  # fmt: skip


def answering():
    """A callback that ends the steps' time, and waits for a line before the next."""
    from transformers import TrainerCallback

    class Answering(TrainerCallback):
        def __init__(self):
            self.steps, self.marks, self.until = 0, [], None

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1
            if self.steps < 2:
                return
            if self.until is not None:
                self.marks.append(time.perf_counter())
                if len(self.marks) < 4 or time.perf_counter() < self.until:
                    return
                between = zip(self.marks, self.marks[1:], strict=False)
                print(statistics.median(b - a for a, b in between), flush=True)
            else:
                print("ready", flush=True)
            self._wait()

        def _wait(self):
            for line in sys.stdin:
                if line in ("memory\n", "steps\n"):
                    print(peak_rss(os.getpid()) if line == "memory\n" else self.steps, flush=True)
                    continue
                self.marks, self.until = [time.perf_counter()], time.perf_counter() + float(line)
                return
            raise SystemExit

    return Answering()


def main() -> None:
    """Train until stdin ends. What the trainer prints goes to stderr: stdout holds the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = answers
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Work(**json.loads(sys.argv[1])), folder, answering())
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
