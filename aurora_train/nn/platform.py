"""The platform for which a model is traced. It can be set, because plans for other machines are traced on this one."""

import contextlib
import contextvars

import jax

_target = contextvars.ContextVar("target_platform", default=None)


@contextlib.contextmanager
def target_platform(name: str):
    """In this context, layers choose their forms for `name` ("cpu", "gpu", "tpu"), and no device is probed."""
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)


def platform() -> str:
    """The platform for which layers are written: "cpu", "gpu" or "tpu"."""
    return _target.get() or jax.default_backend()


def is_remote() -> bool:
    """Whether `target_platform` set the platform, so that this machine's devices are irrelevant."""
    return _target.get() is not None
