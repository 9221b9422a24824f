"""The chunked cross-entropy against one that holds all logits: bytes of the compiled gradient, and its time.

    python benchmarks/loss.py [--vocabulary 131072] [--width 512] [--precision bfloat16 float32] [--rounds 3]

Both are given hidden states, an untied head and targets, and return the loss and both gradients. Bytes are the
temporaries of the compiled program, for --tokens; the times, in turn in one run, are for --timed-tokens, since all
logits of a long batch do not fit a small machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from datetime import date

from aurora_train.machine.hugepages import restart_with_huge_pages
from aurora_train.machine.profile import cpu_model


def sides(vocabulary: int):
    """{"chunked", "full"}: functions of (hidden, head, targets, weights) that give (loss, gradients)."""
    import jax
    import jax.numpy as jnp

    from aurora_train.nn.losses import chunk_tokens, chunked_nll, logits_of

    def chunked(hidden, head, targets, weights):
        return chunked_nll(hidden, head, targets, weights, vocab_first=False, chunk=chunk_tokens("auto", vocabulary))

    def full(hidden, head, targets, weights):
        logits = logits_of(hidden, head, vocab_first=False)
        hit = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return ((jax.nn.logsumexp(logits, -1) - hit) * weights).sum()

    return {name: jax.jit(jax.value_and_grad(f, (0, 1))) for name, f in (("chunked", chunked), ("full", full))}


def arguments(options, tokens: int, precision: str):
    """Shapes and types of one call."""
    import jax

    assert tokens % 512 == 0, "rows of 512 tokens"
    shape = (tokens // 512, 512)
    return [
        jax.ShapeDtypeStruct((*shape, options.width), precision),
        jax.ShapeDtypeStruct((options.width, options.vocabulary), "float32"),
        jax.ShapeDtypeStruct(shape, "int32"),
        jax.ShapeDtypeStruct(shape, "float32"),
    ]


def measure(options, precision: str) -> str:
    """One line of the table."""
    import jax
    import jax.numpy as jnp

    functions = sides(options.vocabulary)
    wide, timed = (arguments(options, tokens, precision) for tokens in (options.tokens, options.timed_tokens))
    size = {n: f.lower(*wide).compile().memory_analysis().temp_size_in_bytes for n, f in functions.items()}
    compiled = {name: f.lower(*timed).compile() for name, f in functions.items()}
    keys = jax.random.split(jax.random.key(0), 2)
    values = [
        jax.random.normal(keys[0], timed[0].shape).astype(precision), jax.random.normal(keys[1], timed[1].shape) * 0.02,
        (jnp.arange(options.timed_tokens) % options.vocabulary).astype("int32").reshape(timed[2].shape),
        jnp.ones(timed[3].shape),
    ]  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for count in range(options.rounds + 1):
        for name, step in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(step(*values))
            if count:  # the first pays for fresh pages
                seconds[name].append(time.perf_counter() - began)
    ratio = statistics.median(a / b for a, b in zip(seconds["chunked"], seconds["full"], strict=True))
    told = [precision, *(f"{size[n] / 1e9:.2f} GB" for n in size), f"**1/{size['full'] / size['chunked']:.1f}**"]
    told += [*(f"{statistics.median(seconds[n]):.2f} s" for n in seconds), f"**{ratio:.2f}**"]
    return f"| {' | '.join(told)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--timed-tokens", type=int, default=4096)
    parser.add_argument("--precision", nargs="*", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    restart_with_huge_pages()
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores")
    print(f"vocabulary {options.vocabulary:,}, width {options.width}, {options.rounds} rounds;")
    print(f"bytes for {options.tokens:,} tokens, times for {options.timed_tokens:,}\n")
    print("| precision | chunked | full | bytes, ratio | chunked | full | time, chunked over full |")
    print("|---|---|---|---|---|---|---|")
    for precision in options.precision:
        print(measure(options, precision), flush=True)


if __name__ == "__main__":
    main()
