"""Passwords and keys in the training texts, by the patterns of `detect-secrets` that belong to one service or format.

Its detectors of any long random text, of words such as `password`, and of formats that hashes have by chance are left
out: in a corpus they find thousands of things that are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from aurora_train.errors import MissingExtra

_DETECTORS = (
    "AWS Access Key", "Azure Storage Account access key", "Discord Bot Token", "GitHub Token", "GitLab Token",
    "JSON Web Token", "Mailchimp Access Key", "NPM tokens", "OpenAI Token", "Private Key", "PyPI Token",
    "SendGrid API Key", "Slack Token", "Square OAuth Secret", "Stripe Access Key", "Telegram Bot Token",
)  # fmt: skip
_SHOWN = 4  # characters of a secret: a message must not hold it


def patterns() -> dict[str, list[re.Pattern]]:
    """The patterns by the kind of secret. MissingExtra without the package."""
    try:
        from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    except ImportError as error:
        raise MissingExtra("detect-secrets", "gates", "`gates.secrets`") from error
    known = get_mapping_from_secret_type_to_class()
    return {kind: list(known[kind]().denylist) for kind in _DETECTORS if kind in known}


def search(texts: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A line for each secret in the training texts, (name, text) each: which text, which line, of what kind."""
    known = patterns()
    for name, text in texts:
        for kind, expressions in known.items():
            for expression in expressions:
                for found in expression.finditer(text):
                    line = text.count("\n", 0, found.start()) + 1
                    yield f"{name}:{line}: {kind} ({found[0].strip()[:_SHOWN]}...)"
