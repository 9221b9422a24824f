"""Scores of a classifier, and a baseline that counts words. Needs only numpy."""

from __future__ import annotations

import re

import numpy as np

_WORD = re.compile(r"\w+")


def confusion(truth, read, num_classes: int) -> np.ndarray:
    """int64[C, C]: how often each class (row) was classified as each class (column)."""
    return np.bincount(truth * num_classes + read, minlength=num_classes**2).reshape(num_classes, num_classes)


def accuracy(counts) -> float:
    """The share of the diagonal of a confusion table."""
    return float(np.trace(counts) / counts.sum())


def f1(counts) -> np.ndarray:
    """F1 of each class, float64[C]: 2 TP / (2 TP + FP + FN); 0 for a class that is neither present nor predicted."""
    return 2 * np.diag(counts) / np.maximum(counts.sum(0) + counts.sum(1), 1)


def macro_f1(counts) -> float:
    """The mean F1 of the classes that occur, all weighted equally."""
    return float(f1(counts)[counts.sum(1) > 0].mean())


def naive_bayes(texts: list[str], labels: np.ndarray, others: list[str], num_classes: int) -> np.ndarray:
    """The class of each of the `others`, int64[n], by the words of `texts`, whose classes are `labels` int[m].

    Multinomial, with Laplace's smoothing (McCallum and Nigam 1998). Words that occur in no text are ignored.
    """
    words = [_WORD.findall(text) for text in texts]
    number = {word: i for i, word in enumerate(sorted({word for text in words for word in text}))}
    counts = np.ones((num_classes, len(number)))
    for label, text in zip(labels, words, strict=True):
        np.add.at(counts[label], [number[word] for word in text], 1)
    likely = np.log(counts / counts.sum(1, keepdims=True))
    prior = np.log(np.bincount(labels, minlength=num_classes) + 1)
    known = ([number[word] for word in _WORD.findall(text) if word in number] for text in others)
    return np.array([np.argmax(likely[:, text].sum(1) + prior) for text in known])
