"""The peer of train_step.py and gpu.py: transformers' GPT-2 or Llama under torch, in a process of its own.

Run as a script it answers each line of stdin with a line: to seconds, with the median seconds of a step over as long;
to "memory", with the most bytes torch held on the device (of the process on a CPU); to "parameters", with how many
are trained and frozen. Needs torch, transformers and nothing of ours.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass

from sides import Side, peak_rss

KINDS = ("eager", "compiled")
OUT_OF_MEMORY = "out of memory"
ADAPTED = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj", "gate": "gate_proj", "up": "up_proj",
           "down": "down_proj"}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What torch is to train. `model`: the `model` section of our config with every shape in it.

    `kind`: one of KINDS. `microbatch`: examples at a time, None for all. `checkpointing`: each layer is recomputed.
    """

    model: dict
    vocabulary: int
    sequence: int
    batch: int
    precision: str = "bfloat16"
    kind: str = "compiled"
    device: str = "cpu"
    microbatch: int | None = None
    checkpointing: bool = False


def torch_side(work: Work, **options) -> Side:
    """Torch, in a process of its own. `options`: those of Side."""
    return Side(__file__, json.dumps(asdict(work)), **options)


def causal_sdpa() -> str:
    """The name of transformers' own SDPA, registered without a function that makes masks.

    Compiled, transformers writes the causal mask out (its test of whether it may be left out does not hold while
    tracing), and SDPA with a mask has neither the flash kernel nor grouped keys: torch would be measured without them.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    return "sdpa_causal"


def build(model: dict, vocabulary: int, sequence: int):
    """transformers' model of a `model` section, with random weights, where and in which dtype torch's defaults say."""
    import transformers

    transformers.logging.set_verbosity_error()
    if model.get("norm") == "layernorm":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=model["width"], n_layer=model["layers"], n_head=model["heads"],
            n_positions=sequence, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, attn_implementation=causal_sdpa(),
        ))  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=model["width"], num_hidden_layers=model["layers"],
        num_attention_heads=model["heads"], num_key_value_heads=model["kv_heads"],
        intermediate_size=model["mlp_width"], max_position_embeddings=sequence,
        tie_word_embeddings=model["tied"], attn_implementation=causal_sdpa(),
    ))  # fmt: skip


def adapt(model, lora: dict) -> None:
    """Freeze a Llama and give its targeted kernels adapters in float32, as peft does: y + (alpha / rank) (x A) B."""
    import torch

    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            place = {"bias": False, "device": base.weight.device, "dtype": torch.float32}
            self.base, self.scale = base, lora["alpha"] / lora["rank"]
            self.down = torch.nn.Linear(base.in_features, lora["rank"], **place)
            self.up = torch.nn.Linear(lora["rank"], base.out_features, **place)
            torch.nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x) * self.scale)

    model.requires_grad_(False)
    names = {ADAPTED[target] for target in lora["targets"]}
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name in names & set(dict(part.named_children())):
                setattr(part, name, Adapted(getattr(part, name)))


def make_model(work: Work):
    """The model of some work on its device: float32, or a base in bfloat16 with adapters in float32."""
    import torch

    torch.manual_seed(0)
    lora = work.model.get("lora")
    torch.set_default_dtype(getattr(torch, work.precision) if lora else torch.float32)
    with torch.device(work.device):
        model = build(work.model, work.vocabulary, work.sequence)
    torch.set_default_dtype(torch.float32)
    if lora:
        adapt(model, lora)
    model.config.use_cache = False
    model.train()
    if work.checkpointing:
        newer = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 6 on
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def make_step(work: Work):
    """(model, function of no argument that takes one step): forward, backward, clip by norm 1, fused AdamW."""
    import torch
    from torch.nn import functional

    model = make_model(work)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, work.vocabulary, (work.batch, work.sequence + 1), device=work.device)
    pieces = tokens.split(work.microbatch or work.batch)

    def loss_of(inputs, targets):
        with torch.autocast(work.device, torch.bfloat16, enabled=work.precision == "bfloat16"):
            logits = model(inputs).logits
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets)

    loss_of = torch.compile(loss_of, dynamic=False) if work.kind == "compiled" else loss_of

    def step() -> None:
        for piece in pieces:
            loss = loss_of(piece[:, :-1].contiguous(), piece[:, 1:].reshape(-1))
            (loss / len(pieces)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


def timed(step, seconds: float, device: str) -> float:
    """Median seconds from the end of one step to the end of the next, one being under way while the last is awaited:
    as `aurora train` does it, so that a GPU never waits for Python."""
    import torch

    marks, before, until = [], None, time.perf_counter() + seconds
    while len(marks) < 4 or time.perf_counter() < until:
        step()
        if device != "cpu":
            done = torch.cuda.Event()
            done.record()
            if before is not None:
                before.synchronize()
            before = done
        marks.append(time.perf_counter())
    return statistics.median(b - a for a, b in zip(marks[1:], marks[2:], strict=False))


def serve(work: Work) -> None:
    """Answer on stdout to each line of stdin; where memory does not suffice, say that instead of ready."""
    import torch

    if work.device != "cpu":
        torch.set_float32_matmul_precision("high")  # as XLA does by default
    try:
        model, step = make_step(work)
        for _ in range(3):
            step()
        if work.device != "cpu":
            torch.cuda.synchronize()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in (OUT_OF_MEMORY, "ALLOC_FAILED")):
            print(OUT_OF_MEMORY, flush=True)
            return
        raise
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad == trained) for trained in (True, False)]
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "memory\n":
            print(peak_rss(os.getpid()) if work.device == "cpu" else torch.cuda.max_memory_allocated(), flush=True)
        elif line == "parameters\n":
            print(*counts, flush=True)
        else:
            print(timed(step, float(line), work.device), flush=True)


if __name__ == "__main__":
    serve(Work(**json.loads(sys.argv[1])))
