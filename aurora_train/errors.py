"""The one error that a user can cause, which the command line prints as a single message; and the end by a signal."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can fix: what is wrong, where, why, and the nearest thing that would work.

    Args:
        what: the fault in one sentence, without a full stop.
        where: `file:line:column`, a config key, or a path.
        why: the rule that was broken, when `what` does not say it.
        hint: the nearest thing that works; often a command.
    """

    status = 2  # exit status of a process that ends with this error

    def __init__(self, what, *, where=None, why=None, hint=None):
        self.what, self.where, self.why, self.hint = what, where, why, hint
        head = f"{where}: {what}" if where else what
        super().__init__("\n  ".join(part for part in (head, why, hint) if part))


class MissingExtra(UserError):
    """An optional package is not installed; the message has the pip command that installs it."""

    def __init__(self, package, extra, needed_for):
        super().__init__(
            f"{needed_for} needs the package `{package}`, which is not installed",
            hint=f"pip install 'aurora_train[{extra}]'",
        )


class Stopped(Exception):
    """A signal asked for the end where leaving at once loses nothing: while preparing, compiling, evaluating."""


def nearest(
    word, known: Iterable[str], otherwise: str | None = None, *, form: str = "{}", cutoff: float = 0.6
) -> str | None:
    """The hint "did you mean `...`?" with the known word most like `word` written as in `form`; else `otherwise`."""
    near = difflib.get_close_matches(word, list(known), 1, cutoff) if isinstance(word, str) else []
    return f"did you mean `{form.format(near[0])}`?" if near else otherwise
