"""How tests compile: quickly, and as a run does where a test is marked `optimized`.

Two settings make XLA:CPU compile a small step in a fifth of the time: LLVM optimises nothing, and fused operations are
emitted one by one instead of through MLIR (jaxlib 0.10 only). Both kinds of programs compute the same mathematics; they
may round otherwise. Processes that a test starts inherit the choice from the environment, so that their runs can be
compared with runs in this process.
"""

from __future__ import annotations

import os
from importlib.metadata import version

NO_OPTIMIZATIONS = "JAX_DISABLE_MOST_OPTIMIZATIONS"
EMITTERS = "xla_cpu_use_fusion_emitters"
NO_EMITTERS = f"--{EMITTERS}=false"

_given = os.environ.get("XLA_FLAGS", "")  # what the caller of the tests wants of XLA
_quick = False
_own_options = None  # jax's own function, while another one stands in its place


def compile_quickly() -> None:
    """Let this process and those it starts compile quickly. To be called before jax is imported."""
    global _quick
    _quick = True
    _inherit()


def knows_emitters() -> bool:
    """Whether this release of jaxlib has the second setting. One that does not know it ends the process: so does
    0.12.0.1, although the name is in its library."""
    return version("jaxlib").startswith("0.10.")


def settings() -> dict[str, str]:
    """Environment variables with which another process compiles as this one does."""
    return {NO_OPTIMIZATIONS: "1"} | ({"XLA_FLAGS": NO_EMITTERS} if knows_emitters() else {}) if _quick else {}


def set_optimized(wanted: bool) -> None:
    """Compile as a run does, or quickly again. A change forgets what this process has compiled."""
    global _quick, _own_options
    if wanted is not _quick:
        return
    import jax
    from jax._src import compiler

    _quick = not wanted
    if wanted and knows_emitters():
        own = _own_options = compiler.get_compile_options

        def with_emitters(*arguments, env_options_overrides=None, **options):
            overrides = {EMITTERS: True, **(env_options_overrides or {})}
            return own(*arguments, env_options_overrides=overrides, **options)

        compiler.get_compile_options = with_emitters
    elif _own_options is not None:
        compiler.get_compile_options = _own_options
    _inherit()
    jax.config.update(NO_OPTIMIZATIONS.lower(), _quick)
    jax.clear_caches()


def _inherit() -> None:
    os.environ[NO_OPTIMIZATIONS] = str(int(_quick))
    os.environ["XLA_FLAGS"] = f"{_given} {NO_EMITTERS}".strip() if _quick and knows_emitters() else _given
