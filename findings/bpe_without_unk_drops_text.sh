#!/usr/bin/env bash
# tokenizers 0.23.3: a BPE model without an unknown token drops what its vocabulary lacks and says nothing, where
# WordLevel and WordPiece of the same library raise. What is dropped is dropped before merging: "axb" is the one token
# "ab", as "ab" itself is, and "xyz" is no token at all. So two texts have the same ids, bits per byte computed from the
# ids are too good, and nothing fails.
# Seen: BPE [] for "xyz" and [2] for "axb" (id 2 is "ab"); WordLevel and WordPiece raise Exception.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'tokenizers==0.23.3'
"$work/venv/bin/python" - <<'P'
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers

assert tokenizers.__version__ == "0.23.3"
bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
print("BPE 'xyz':", bpe.encode("xyz").ids, " 'axb':", bpe.encode("axb").ids)
assert bpe.encode("xyz").ids == [] and bpe.encode("axb").ids == [2] == bpe.encode("ab").ids
for model in (models.WordLevel({"a": 0}), models.WordPiece({"a": 0})):
    other = Tokenizer(model)
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    try:
        ids = other.encode("xyz").ids
    except Exception as error:
        print(type(model).__name__, "raises:", error)
    else:
        raise SystemExit(f"{type(model).__name__} no longer raises: {ids}")
P
echo "as described"
