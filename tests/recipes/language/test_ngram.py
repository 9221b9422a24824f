"""The n-gram model is the textbook's, adds up to one, and does not depend on how its tables are stored."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from language.ngram import NGram

WORDS = [b"def ", b"return ", b"self", b".", b"(", b")\n", b"    ", b"x", b"y = ", b"import ", b"\x00", b"\xff"]


def random_texts(seed, num_documents, num_words, words=WORDS):
    rng = np.random.default_rng(seed)
    return [b"".join(words[i] for i in rng.geometric(0.3, num_words) % len(words)) for _ in range(num_documents)]


class Textbook:
    """Interpolated modified Kneser-Ney from dicts, straight from Chen and Goodman's equations."""

    def __init__(self, texts, order):
        self.order, self.counts = order, []
        padded = [bytes(order) + text for text in texts]
        windows = [doc[i - order + 1 : i + 1] for doc in padded for i in range(order, len(doc))]
        for length in range(1, order):
            longer = {w[-length:]: set() for w in windows}
            for doc in padded:
                for i in range(order, len(doc)):
                    longer[doc[i - length + 1 : i + 1]].add(doc[i - length])
            self.counts.append({ngram: len(before) for ngram, before in longer.items()})
        self.counts.append(Counter(windows))
        self.followers = []
        for counts in self.counts:
            followers = defaultdict(dict)
            for ngram, count in counts.items():
                followers[ngram[:-1]][ngram[-1]] = count
            self.followers.append(followers)
        self.discounts = [self.discounts_of(counts) for counts in self.counts]

    @staticmethod
    def discounts_of(counts):
        n = [sum(c == k for c in counts.values()) for k in range(5)]
        if min(n[1:]) == 0:
            return [0, 0.5, 1.0, 1.5]
        y = n[1] / (n[1] + 2 * n[2])
        found = [0] + [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
        return found if all(0 < found[k] < k for k in (1, 2, 3)) else [0, 0.5, 1.0, 1.5]

    def probability(self, byte, context, length=None):
        length = self.order if length is None else length
        if length == 0:
            return 1 / 256
        shorter = self.probability(byte, context, length - 1)
        history = (bytes(self.order) + context)[-(length - 1) :] if length > 1 else b""
        followers = self.followers[length - 1].get(history)
        if followers is None:
            return shorter
        discount = self.discounts[length - 1]
        total = sum(followers.values())
        count = followers.get(byte, 0)
        left = sum(discount[min(c, 3)] for c in followers.values())
        return (count - discount[min(count, 3)]) / total + left / total * shorter


@pytest.mark.parametrize("order", [1, 2, 4, 9])
def test_probabilities_are_the_textbooks(order):
    train, test = random_texts(0, 8, 60), random_texts(1, 3, 12) + [b""]
    model, textbook = NGram.fit(train, order), Textbook(train, order)
    expected = [sum(-np.log2(textbook.probability(t[i], t[:i])) for i in range(len(t))) for t in test]
    np.testing.assert_allclose(model.bits_per_document(test), expected, rtol=1e-12)


@pytest.mark.parametrize("num_words", [1, 30, 300])
def test_probabilities_of_all_bytes_add_up_to_one_in_any_context(num_words):
    model = NGram.fit(random_texts(2, 5, num_words), order=6)
    rng = np.random.default_rng(3)
    seen = random_texts(2, 5, num_words)[0]
    contexts = [b"", seen[:3], seen, b"\x00\x00", rng.bytes(9), seen[:-1] + rng.bytes(1)]
    for context in contexts:
        probabilities = model.distribution(context)
        assert probabilities.min() > 0
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_the_distribution_is_what_a_document_is_charged():
    model = NGram.fit(random_texts(4, 5, 100), order=5)
    text = b"self.x = y"
    charged = sum(-np.log2(model.distribution(text[:i])[text[i]]) for i in range(len(text)))
    assert model.bits_per_document([text])[0] == pytest.approx(charged)


def test_documents_are_scored_independently_of_their_neighbours():
    model = NGram.fit(random_texts(5, 5, 100), order=7)
    texts = random_texts(6, 4, 10)
    together = model.bits_per_document(texts)
    np.testing.assert_allclose(together, [model.bits_per_document([text])[0] for text in texts], rtol=1e-12)


def test_longer_contexts_help_on_text_that_has_them():
    train, test = random_texts(7, 30, 200, WORDS[:4]), random_texts(8, 5, 200, WORDS[:4])
    bits = [NGram.fit(train, order).bits_per_document(test).sum() for order in (1, 2, 4)]
    assert bits[0] > bits[1] > bits[2]


def test_a_cap_on_training_bytes_takes_whole_documents_from_all_over_the_list():
    texts = [bytes([65 + i // 4]) * 100 for i in range(40)]
    model = NGram.fit(texts, order=2, max_bytes=1000)
    assert model.trained_bytes == 1000
    assert model.distribution(b"")[65:75].min() > 0.05


def test_a_model_of_nothing_is_uniform():
    np.testing.assert_allclose(NGram.fit([], order=3).distribution(b"abc"), 1 / 256)
