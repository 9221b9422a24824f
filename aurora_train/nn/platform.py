"""The platform a model is being traced for. A plan for another machine is traced on this one, so it can be set."""

import contextlib
import contextvars

import jax

_target = contextvars.ContextVar("target_platform", default=None)


@contextlib.contextmanager
def target_platform(name: str):
    """Within, layers choose their forms for `name` ("cpu", "gpu", "tpu") and no device is probed."""
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)


def platform() -> str:
    """The platform layers are to be written for: "cpu", "gpu" or "tpu"."""
    return _target.get() or jax.default_backend()


def is_remote() -> bool:
    """Whether the target was set by `target_platform`, so that this machine's devices say nothing about it."""
    return _target.get() is not None
