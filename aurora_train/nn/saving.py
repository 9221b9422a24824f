"""What a plan may name: the tags that layers give with `checkpoint_name`, and the outputs of kernels that take none.

A library kernel with a backward pass of its own holds residuals that no tag can reach (the log-sum-exp of cuDNN's
attention). They are named by their primitive, so that a plan can keep them instead of running the kernel again.
"""

from __future__ import annotations

# Primitive -> the tag its outputs go by.
KERNELS = {"dot_product_attention_fwd_wrapper": "attn_flash"}


def tag_of(primitive: str, params: dict) -> str | None:
    """The tag of an equation's outputs, or None."""
    if primitive in ("name", "checkpoint_name"):
        return params["name"]
    return KERNELS.get(primitive)


def policy(save: tuple[str, ...]):
    """A policy for `jax.checkpoint` that keeps the tags in `save` and nothing else."""
    kept = frozenset(save)

    def saveable(primitive, *_, **params) -> bool:
        return tag_of(primitive.name, params) in kept

    return saveable
