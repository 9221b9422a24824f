"""Low-rank adapters as a config section: which kernels get one, and how its output is scaled. Free of jax."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

from aurora_train.config import Section, WrongKey, setting

KERNELS = ("query", "key", "value", "out", "gate", "up", "down")
NF4_BLOCK = 64  # inputs of a kernel that share a scale in 4-bit storage
# What the PEFT library calls them in most families.
_THEIRS = {
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out", "gate_proj": "gate", "up_proj": "up",
    "down_proj": "down", "embed_tokens": "embedding", "wte": "embedding", "lm_head": "head", "all-linear": "*",
}  # fmt: skip


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021). With them, nothing else is trained."""

    rank: int = setting(16, resume="frozen", ge=1, help="inner size r of the adapter of each kernel")
    alpha: float = setting(
        32.0, resume="frozen", gt=0, help="the adapter's output is multiplied by alpha / rank, or as `scaling` says"
    )
    scaling: Literal["standard", "rank_stabilised"] = setting(
        "standard", resume="frozen",
        help="standard: alpha / rank; rank_stabilised: alpha / sqrt(rank), for high ranks (Kalajdzievski 2023, rsLoRA)",
    )
    targets: tuple[str, ...] = setting(
        KERNELS, resume="frozen", min_length=1, strict=False,
        help="what gets one, by name or pattern: query, mlp.*, embedding, head, * for all; a plain MLP has no gate",
    )
    base: Literal["compute", "nf4"] = setting(
        "compute", resume="frozen",
        help="how the frozen kernels of the blocks are stored: as they are computed with, or in 4 bits (QLoRA)",
    )

    @property
    def scale(self) -> float:
        """What the product of an adapter's two matrices is multiplied by."""
        return scale_of(self.alpha, self.rank, self.scaling == "rank_stabilised")

    def adapts(self, place: str, name: str) -> bool:
        """Whether the kernel `name` of a module gets an adapter. `place`: the module's name in its block, or ""."""
        names = (name, f"{place}.{name}") if place else (name,)
        return any(fnmatchcase(one, pattern) for one in names for pattern in self.targets)


def scale_of(alpha: float, rank: int, rank_stabilised: bool) -> float:
    """alpha / rank (Hu et al. 2021), or alpha / sqrt(rank) (Kalajdzievski 2023)."""
    return alpha / (rank**0.5 if rank_stabilised else rank)


def refuse_targets(lora: Lora, kernels: Iterable[str], tied: bool) -> None:
    """WrongKey for a target that no kernel of a model has. The default names a gate, which a plain MLP lacks.

    `kernels`: what may get an adapter, with its place (`attention.query`).
    """
    known = [(name.rpartition(".")[0], name.rpartition(".")[2]) for name in kernels]
    for pattern in lora.targets:
        one = lora.model_copy(update={"targets": (pattern,)})
        if any(one.adapts(*name) for name in known) or lora.targets == KERNELS:
            continue
        if pattern == "head" and tied:
            raise WrongKey("the head is the embedding in a tied model: name the embedding, whose adapter then serves "
                           "both", key="lora.targets")  # fmt: skip
        nearest = _nearest(pattern, known)
        raise WrongKey(f"nothing in this model is called {pattern!r}; {nearest}", key="lora.targets")


def _nearest(pattern: str, known: Sequence[tuple[str, str]]) -> str:
    names = list(dict.fromkeys(name for pair in known for name in (pair[1], ".".join(filter(None, pair)))))
    near = [_THEIRS[pattern]] if pattern in _THEIRS else get_close_matches(pattern, names, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(dict.fromkeys(name for _, name in known))}"


def refuse_unfit_blocks(inputs: dict[str, int]) -> None:
    """WrongKey for a size of a kernel's inputs, by the setting it follows from, that 4-bit storage cannot cut."""
    for name, size in inputs.items():
        if size % NF4_BLOCK:
            near = max(round(size / NF4_BLOCK), 1) * NF4_BLOCK
            what = f"nf4 needs {name} ({size}) to be a multiple of {NF4_BLOCK}; {near} would be"
            raise WrongKey(what, key="lora.base")
