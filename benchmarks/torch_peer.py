"""The peer of train_step.py: transformers' GPT-2 or Llama under torch, in a process of its own.

Run as a script it reads seconds from stdin, trains for as long, and answers with the median seconds of a step.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

KINDS = ("eager", "compiled")


def peak_rss(pid: int) -> int:
    """Bytes: VmHWM of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class Side:
    """One side of a comparison: a process that says ready, and answers each line of seconds with those of a step."""

    def __init__(self, *command: str):
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self._process.stdout.readline() != "ready\n":
            sys.exit(f"{' '.join(command)} failed")

    def run(self, seconds: float) -> float:
        """Seconds a step."""
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def peak_rss(self) -> int:
        """Bytes."""
        return peak_rss(self._process.pid)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def torch_side(case: dict, precision: str, kind: str) -> Side:
    """Torch, in a process of its own. `case`: the fields of train_step.Case; `kind`: one of KINDS."""
    return Side(__file__, json.dumps(case), precision, kind)


def build(case: dict):
    """transformers' model of a case, with random weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    vocabulary = case["vocabulary"] or 256
    if case["llama"]:
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=case["width"], num_hidden_layers=case["layers"],
            num_attention_heads=case["heads"], num_key_value_heads=case["heads"] // 2, intermediate_size=1408,
            max_position_embeddings=case["sequence"], tie_word_embeddings=True, attn_implementation="sdpa",
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=case["width"], n_layer=case["layers"], n_head=case["heads"],
        n_positions=case["sequence"], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def make_step(case: dict, precision: str, kind: str):
    """A function of no argument that takes one step: forward, backward, clip by norm 1, fused AdamW."""
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    model = build(case)
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, case["vocabulary"] or 256, (case["batch"], case["sequence"] + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1)

    def loss_of(inputs, targets):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(inputs).logits
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets)

    loss_of = torch.compile(loss_of) if kind == "compiled" else loss_of

    def step() -> float:
        loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def serve(case: dict, precision: str, kind: str) -> None:
    """Answer on stdout to each line of stdin."""
    step = make_step(case, precision, kind)
    for _ in range(3):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        until, taken = time.perf_counter() + float(line), []
        while len(taken) < 3 or time.perf_counter() < until:
            began = time.perf_counter()
            step()
            taken.append(time.perf_counter() - began)
        print(statistics.median(taken[1:]), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3])
