"""Compressed sizes are those of the programs' own files; the parse rule forgives the cut and nothing else."""

import gzip
import lzma
import shutil
import subprocess

import numpy as np
import pytest

from language.rivals import compressors, python_parse_share

TEXTS = [b"def add(a, b):\n    return a + b\n" * 20, b"import os\n" * 3, bytes(range(256)) * 4]


def test_bits_per_byte_are_all_compressed_bits_over_all_bytes():
    result = compressors(TEXTS)
    num_bytes = sum(map(len, TEXTS))
    xz = [8 * len(lzma.compress(text, preset=9)) for text in TEXTS]
    assert result["documents"]["xz_9"].tolist() == xz
    assert result["documents"]["bytes"].tolist() == [len(text) for text in TEXTS]
    assert result["bits_per_byte"]["xz_9"] == pytest.approx(sum(xz) / num_bytes)
    assert result["bits_per_byte"]["gzip_9"] == pytest.approx(
        sum(8 * len(gzip.compress(text, 9)) for text in TEXTS) / num_bytes
    )
    whole = 8 * len(lzma.compress(b"".join(TEXTS), preset=9))
    assert result["bits_per_byte"]["xz_9_whole"] == pytest.approx(whole / num_bytes)
    assert set(result["bits_per_byte"]) == {"xz_9", "gzip_9", "bzip2_9", "xz_9_whole"}


@pytest.mark.skipif(not shutil.which("xz"), reason="the program xz is not installed")
def test_xz_counts_what_the_program_writes():
    ours = compressors(TEXTS)["documents"]["xz_9"] // 8
    sizes = [len(subprocess.run(["xz", "-9", "-c", "-T1"], input=t, capture_output=True).stdout) for t in TEXTS]
    np.testing.assert_allclose(ours, sizes, atol=16)


@pytest.mark.skipif(not shutil.which("gzip"), reason="the program gzip is not installed")
def test_gzip_is_as_small_as_the_program_within_a_percent():
    ours = compressors(TEXTS)["documents"]["gzip_9"] // 8
    sizes = [len(subprocess.run(["gzip", "-9", "-c"], input=t, capture_output=True).stdout) for t in TEXTS]
    np.testing.assert_allclose(ours, sizes, rtol=0.01, atol=4)


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\n",
        "x = 1\nprint(x",
        "x = 1\ndef f():\n    retu",
        "x = 1\ndef f():\n",
        "x = 1\ny = [1,\n    2,\n    3",
        "x = 1\n@cached\ndef f(",
        "x = 1\n\fdef f():\n",
        "x = 1\nif x:\n    y = 2\nelse:\n",
        "x = 1\ntry:\n    f()\nexcept A:\n    g()\nexcept B",
        "x = 1\nclass A:\n    def f(self):\n        '''All of it\nat the margin",
    ],
)
def test_a_sample_that_is_only_cut_short_parses(text):
    assert python_parse_share([text]) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only a comment\n",
        "x = (1",
        "x = = 1\ny = 2\n",
        "x = 1\ndef f(:\n    pass\n",
        "x = 1\nif x:\n    y = )\n    z = (",
        "import os\nif x:\n        y\n    z\n    w",
        "x = 1\ntry:\n    f()\nxcept A:\n    g()\nexcept B",
        "'''a string\nthat swallows\nall = that + follows\n",
        "x = 1\n\0\ny = 2\n",
        "x = 1\ny = " + "(" * 500 + "\nz = )\n",
    ],
)
def test_a_sample_that_is_wrong_before_its_end_does_not_parse(text):
    assert python_parse_share([text]) == 0


def test_the_share_is_over_all_samples():
    assert python_parse_share(["x = 1\n", "x = = 1\ny\n", "", "y = 2\nz = ("]) == 0.5
