"""What a plan may name: the tags that layers give with `checkpoint_name`, and the outputs of kernels that take none.

A library kernel with a backward pass of its own holds residuals that no tag can reach (the log-sum-exp of cuDNN's
attention). They are named by their primitive, so that a plan can keep them instead of running the kernel again.
"""

from __future__ import annotations

# Primitive -> the tag its outputs go by.
KERNELS = {"dot_product_attention_fwd_wrapper": "attn_flash"}

# What a unit is given by the one before. Always kept, so it can only be offloaded; a Stack names it, no model does.
UNIT_INPUT = "unit_input"


def tag_of(primitive: str, params: dict) -> str | None:
    """The tag of an equation's outputs, or None."""
    if primitive in ("name", "checkpoint_name"):
        return params["name"]
    return KERNELS.get(primitive)


def can_offload(tag: str) -> bool:
    """Whether jax can move what a tag names: a kernel's outputs it cannot."""
    return tag not in KERNELS.values()


def policy(save: tuple[str, ...], offload: tuple[str, ...] = ()):
    """A policy for `jax.checkpoint` that keeps the tags in `save`, those in `offload` in the processor's memory.

    All else is computed again. What is offloaded is copied out in the forward pass and back before it is read.
    """
    import jax  # here, since what reports a plan needs the names alone

    kept, moved = frozenset(save) - frozenset(offload), frozenset(offload)
    to_host = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=moved, offload_src="device", offload_dst="pinned_host"
    )

    def saveable(primitive, *inputs, **params):
        tag = tag_of(primitive.name, params)
        return to_host(primitive, *inputs, **params) if tag in moved else tag in kept

    return saveable
