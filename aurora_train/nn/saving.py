"""The names that a plan may use: tags set by layers with `checkpoint_name`, and outputs of kernels that take no tag.

A library kernel with its own backward pass holds residuals that no tag can reach (the log-sum-exp of cuDNN's
attention). They are named by their primitive, so that a plan can keep them instead of running the kernel again.
"""

from __future__ import annotations

# Primitive -> the tag of its outputs.
KERNELS = {"dot_product_attention_fwd_wrapper": "attn_flash"}

# A unit's input from the previous unit. It is always kept, so it can only be offloaded; the Stack itself tags it.
UNIT_INPUT = "unit_input"


def tag_of(primitive: str, params: dict) -> str | None:
    """The tag of an equation's outputs, or None."""
    if primitive in ("name", "checkpoint_name"):
        return params["name"]
    return KERNELS.get(primitive)


def can_offload(tag: str) -> bool:
    """Whether jax can offload what a tag names; it cannot offload a kernel's outputs."""
    return tag not in KERNELS.values()


def policy(save: tuple[str, ...], offload: tuple[str, ...] = ()):
    """A policy for `jax.checkpoint` that keeps the tags in `save`; those in `offload` in the processor's memory.

    All else is recomputed. Offloaded arrays are copied out in the forward pass and back before they are read.
    """
    import jax  # here, because code that only reports a plan needs just the names

    kept, moved = frozenset(save) - frozenset(offload), frozenset(offload)
    to_host = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=moved, offload_src="device", offload_dst="pinned_host"
    )

    def saveable(primitive, *inputs, **params):
        tag = tag_of(primitive.name, params)
        return to_host(primitive, *inputs, **params) if tag in moved else tag in kept

    return saveable
