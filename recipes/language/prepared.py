"""A folder of prepared text: prepared data with the tokenizer that made its ids."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from aurora_train.data.prepared import Prepared
from language.tokenizers import Tokenizer


class PreparedText(Prepared):
    """Its arrays are token ids, unless they are .npy files or another dtype is named."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder)

    def array(self, name: str, dtype: str | None = None) -> np.ndarray:
        return super().array(name, dtype or self.manifest["tokenizer"]["dtype"])
