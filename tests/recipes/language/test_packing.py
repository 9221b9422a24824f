"""Conversations become pieces, and pieces packed rows: nothing lost, nothing shared, and few places empty."""

import json
from typing import NamedTuple

import numpy as np
import pytest
from chats import functions

from aurora_train.data.order import mixed, slots
from aurora_train.errors import UserError
from language.answers import Learned
from language.packing import PackedRows, arrange
from language.prepare_pieces import Encoding, prepare
from language.settings_tune import ConversationDataConfig
from language.tokenizers import Tokenizer
from language.windows import pack


class Row(NamedTuple):
    """A conversation of the tests: pieces of numbers, of which the last so many are learned."""

    place: str
    pieces: list


def encode(row: Row) -> list[Learned]:
    made = []
    for length, learned in row.pieces:
        ids = np.array([ord(c) for c in row.place[:1]] + [97 + n % 26 for n in range(length)], np.int32)
        made.append(Learned(ids, np.arange(length + 1) > length - learned, []))
    return [piece for piece in made if piece.learned.any()]


def read(corpus, data, say=print):
    for name, path in corpus.files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            yield Row(f"line {number} of {name}", json.loads(line)["pieces"])


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"pieces": row}) + "\n" for row in rows))
    return str(path)


def prepared(tmp_path, sequence=32, names=("",), **settings):
    data = ConversationDataConfig(**{"sequence": sequence, "holdout_test": 0.2, "holdout_validation": 0.1} | settings)

    def packed(*arguments):
        return arrange(*arguments, sequence, list(names))

    return prepare(Encoding("rows", read, encode, {}, packed), data, tmp_path / "cache", Tokenizer(), lambda *_: None)


def drawn(count, seed=0, longest=32):
    random = np.random.default_rng(seed)
    lengths = random.integers(2, longest + 1, count).tolist()
    return [[[length, int(random.integers(1, length + 1))]] for length in lengths]


def test_every_piece_is_in_one_row_whole_and_its_positions_restart(tmp_path):
    store = prepared(tmp_path, source=write(tmp_path / "a.jsonl", drawn(200) + [[[5, 2], [9, 3]]]))
    seen = []
    for split in ("train", "validation", "test"):
        rows = PackedRows(store, split, 32)
        batch = rows.take(np.arange(len(rows)))
        for row in range(len(rows)):
            for number, piece in enumerate(rows.pieces_of(row), 1):
                here = batch["segments"][row] == number
                ids, learned = store.ids(piece), store.learned(piece)
                assert batch["tokens"][row][here].tolist() == ids[:-1].tolist()
                assert batch["targets"][row][here].tolist() == ids[1:].tolist()
                assert batch["weights"][row][here].tolist() == learned[1:].tolist()
                assert batch["positions"][row][here].tolist() == list(range(len(ids) - 1))
                assert learned[-1], "nothing after the last learned token is read"
                seen.append(int(piece))
            padding = batch["segments"][row] == 0
            assert not batch["weights"][row][padding].any()
    assert sorted(seen) == list(range(len(store.conversation)))
    several = np.flatnonzero(np.bincount(store.conversation) > 1)
    assert len(several) == 1 and len(set(store.array("split.npy")[store.conversation == several[0]])) == 1


def test_rows_are_full_on_the_lengths_of_real_functions():
    lengths = np.array([len(text.encode()) for text in functions("argparse", "ast", "datetime", "inspect", "typing")])
    lengths = lengths[lengths <= 4096]
    _, _, rows = pack(lengths, 4096)
    fill = lengths.sum() / (rows * 4096)
    print(f"{len(lengths)} functions of {lengths.min()} to {lengths.max()} bytes in {rows} rows, {fill:.2%} full")
    assert len(lengths) > 500 and fill >= 0.97


def test_a_mixture_has_its_shares_to_one_row_and_no_row_has_two_sources(tmp_path):
    mix = {name: {"source": write(tmp_path / f"{name}.jsonl", drawn(60, seed)), "weight": weight}
           for seed, (name, weight) in enumerate({"few": 1.0, "many": 3.0}.items())}  # fmt: skip
    store = prepared(tmp_path, mix=mix, names=("few", "many"))
    rows = PackedRows(store, "train", 32, {"few": 1.0, "many": 3.0})
    few, many = rows.mixture
    assert few.count + many.count == len(rows) and slots(rows.mixture).tolist() == [16384, 49152]  # of 65,536 rows
    chosen = np.concatenate([mixed(7, step, 64, rows.mixture) for step in range(8)])
    assert (chosen < many.first).mean() == pytest.approx(0.25, abs=0.06) and chosen.max() < len(rows)
    for index in range(len(rows)):
        names = {store.place(piece).partition(" of ")[2] for piece in rows.pieces_of(index)}
        assert names == {"few/few.jsonl" if index < many.first else "many/many.jsonl"}
    other = PackedRows(store, "train", 32, {"few": 1.0, "many": 2.0})
    assert other.fingerprint != rows.fingerprint, "the weights are part of what training reads"


def test_equal_conversations_are_in_one_split_wherever_they_stand(tmp_path):
    rows = drawn(40)
    one = prepared(tmp_path / "one", source=write(tmp_path / "one" / "a.jsonl", rows))
    twice = prepared(tmp_path / "two", source=write(tmp_path / "two" / "b.jsonl", rows[::-1] + drawn(9, 5) + rows))

    def splits(store):
        found = {}
        for piece, split in enumerate(store.array("split.npy")):
            found.setdefault(store.ids(piece)[1:].tobytes() + bytes(store.learned(piece)), set()).add(int(split))
        return found

    assert all(len(each) == 1 for each in splits(twice).values())
    moved = [name for name, split in splits(one).items() if splits(twice)[name] != split]
    assert not moved
    assert {2} < set.union(*splits(twice).values())


def test_a_long_conversation_is_refused_left_out_or_cut_as_the_config_says(tmp_path):
    source = write(tmp_path / "a.jsonl", [*drawn(20), [[40, 2]], [[41, 30]]])
    with pytest.raises(UserError, match="line 21 of a.jsonl has 40 tokens, and a row 32") as refused:
        prepared(tmp_path, source=source)
    assert refused.value.where == "data.sequence" and "data.sequence=41;" in refused.value.hint
    assert "2 rows are longer than a row; the longest has 41 tokens" in refused.value.why
    assert not list((tmp_path / "cache").glob("rows-*tmp*")), "a refusal leaves nothing behind"
    counts = prepared(tmp_path, source=source, overlong="leave_out").manifest["sources"][""]
    assert counts["kept"] == 20 and counts["left_out"] == {"longer than 32 tokens": 2}
    store = prepared(tmp_path, source=source, overlong="cut")
    counts = store.manifest["sources"][""]
    assert counts["kept"] == 21 and counts["cut"] == 1 and counts["nothing_learned"] == 1
    last = store.ids(len(store.conversation) - 1)
    assert len(last) == 33 and store.learned(len(store.conversation) - 1).sum() == 21
    assert "1 of them without their end" in store.summary()[0]


def test_rows_without_anything_to_learn_are_counted_and_a_set_of_them_is_refused(tmp_path):
    nothing = [[[5, 0]], [[9, 0]]]
    store = prepared(tmp_path, source=write(tmp_path / "a.jsonl", drawn(20) + nothing))
    assert store.manifest["sources"][""]["nothing_learned"] == 2
    assert "in 2 nothing is learned" in store.summary()[0]
    with pytest.raises(UserError, match="nothing in .* can be learned") as refused:
        prepared(tmp_path, source=write(tmp_path / "b.jsonl", nothing))
    assert "of 2 rows, 2 have no answer" in refused.value.why and "data.sequence" not in refused.value.hint
    for overlong in ("leave_out", "cut"):
        with pytest.raises(UserError, match="nothing in .* can be learned") as refused:
            prepared(tmp_path, source=write(tmp_path / "c.jsonl", [[[40, 2]]]), overlong=overlong)
        assert "data.sequence=40 holds the longest" in refused.value.hint


def test_what_a_template_leaves_out_is_counted_by_conversations_and_said(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "encode", lambda row, once=encode: [
        piece._replace(unwritten=frozenset(["the tools"] if len(row.pieces) > 1 else [])) for piece in once(row)
    ])  # fmt: skip
    store = prepared(tmp_path, source=write(tmp_path / "a.jsonl", drawn(20) + [[[5, 2], [9, 3]]]))
    assert store.manifest["sources"][""]["unwritten"] == {"the tools": 1}
    assert store.losses() == store.summary() and "; in 1 the template does not write the tools" in store.summary()[0]


def test_what_decides_the_rows_decides_their_fingerprint(tmp_path):
    source = write(tmp_path / "a.jsonl", drawn(30))
    first = prepared(tmp_path, source=source)
    assert prepared(tmp_path, source=source).fingerprint == first.fingerprint
    others = [{"holdout_test": 0.3}, {"overlong": "cut"}, {"max_rows": 40}, {"sequence": 33}]
    assert len({first.fingerprint, *(prepared(tmp_path, source=source, **one).fingerprint for one in others)}) == 5
