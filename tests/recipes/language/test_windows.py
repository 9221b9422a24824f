"""Every token of every document is scored once, with the context that was promised, in batches of one shape."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from language.windows import bits_per_document, pack, windows


@st.composite
def cases(draw):
    sequence = draw(st.integers(1, 24))
    lengths = draw(st.lists(st.integers(1, 90), max_size=25))
    overlap = draw(st.integers(0, sequence - 1))
    return lengths, sequence, overlap, draw(st.integers(1, 5))


def documents_of(lengths):
    """Every token is unique, so that a target names its document and its place there."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end, dtype=np.uint16) for end, length in zip(ends, lengths, strict=True)]


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_target_is_scored_exactly_once_for_any_lengths_and_overlap(case):
    lengths, sequence, overlap, batch = case
    documents = documents_of(lengths)
    scored = [(b["targets"][b["weights"] > 0], b["document"][b["weights"] > 0]) for b in windows(documents, *case[1:])]
    expected = [(token, i) for i, document in enumerate(documents) for token in document[1:]]
    assert sorted(pair for t, d in scored for pair in zip(t.tolist(), d.tolist(), strict=True)) == expected


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_scored_target_sees_at_least_overlap_tokens_where_its_document_has_them(case):
    lengths, sequence, overlap, batch = case
    documents = documents_of(lengths)
    for b in windows(documents, sequence, overlap, batch):
        for row, column in np.argwhere(b["weights"] > 0):
            document = documents[b["document"][row, column]]
            place = b["targets"][row, column] - document[0]
            context = b["positions"][row, column] + 1
            assert context >= min(overlap + 1, place)
            inputs = b["tokens"][row, column - context + 1 : column + 1]
            np.testing.assert_array_equal(inputs, document[place - context : place])


@settings(max_examples=60, deadline=None)
@given(cases())
def test_no_segment_holds_two_documents_and_no_target_crosses_one(case):
    lengths, sequence, overlap, batch = case
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for b in windows(documents_of(lengths), sequence, overlap, batch):
        real = b["segments"] > 0
        np.testing.assert_array_equal(owner[b["tokens"][real]], owner[b["targets"][real]])
        for row in range(batch):
            for segment in range(1, b["segments"][row].max() + 1):
                (columns,) = np.nonzero(b["segments"][row] == segment)
                np.testing.assert_array_equal(b["positions"][row, columns], np.arange(len(columns)))
                np.testing.assert_array_equal(columns, columns[0] + np.arange(len(columns)))
                assert len(set(owner[b["tokens"][row, columns]])) == 1


@settings(max_examples=60, deadline=None)
@given(cases())
def test_all_batches_have_one_shape_and_padding_weighs_nothing(case):
    lengths, sequence, overlap, batch = case
    batches = windows(documents_of(lengths), sequence, overlap, batch)
    listed = list(batches)
    assert len(listed) == len(batches)
    assert sum(b["weights"].sum() for b in listed) == batches.num_targets == sum(lengths) - len(lengths)
    for b in listed:
        for name, array in b.items():
            assert array.shape == (batch, sequence)
            assert array.dtype == (np.float32 if name == "weights" else np.int32)
        padding = b["segments"] == 0
        assert not b["weights"][padding].any() and (b["document"][padding] == -1).all()
        np.testing.assert_array_equal(b["document"] >= 0, b["weights"] > 0)


def test_the_same_documents_give_the_same_batches_twice():
    documents = documents_of([5, 40, 1, 3, 17, 2, 2, 30])
    first, second = (list(windows(documents, 16, 5, 2)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=200))
def test_packing_overlaps_nothing_and_wastes_little(lengths):
    row, column, num_rows = pack(np.array(lengths, np.int64), 50)
    used = np.zeros((num_rows, 50), int)
    for length, r, c in zip(lengths, row, column, strict=True):
        used[r, c : c + length] += 1
    assert used.max(initial=0) <= 1 and used.sum() == sum(lengths)
    assert (used[:, 0] == 1).all()
    assert num_rows <= 11 / 9 * -(-sum(lengths) // 50) * 1.5 + 1


def test_bits_are_summed_per_document_whatever_padding_and_context_hold():
    documents = documents_of([9, 1, 30, 4])
    price = np.random.default_rng(0).uniform(0.1, 8, 100)
    scored = []
    for batch in windows(documents, 8, 3, 2):
        scored.append((batch, np.where(batch["weights"] > 0, price[batch["targets"]], np.nan).astype(np.float32)))
    expected = [price[document[1:]].sum() / np.log(2) for document in documents]
    np.testing.assert_allclose(bits_per_document(scored, 4), expected, rtol=1e-6)
