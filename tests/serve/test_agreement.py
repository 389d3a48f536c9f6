"""What processes compare before a run: another GGUF file, tokenizer or head split beside it is seen."""

from __future__ import annotations

import pytest

from razor_jax import HeadSplit
from razor_jax.heads import store
from razor_jax.serve import agreement

from ..support.gguf_files import write


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "model.gguf")


def test_equal_files_agree_wherever_they_are(tmp_path, file):
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / "COPY.GGUF"
    copy.write_bytes(file.read_bytes())
    assert agreement.describe(copy) == agreement.describe(file) == agreement.describe(copy.parent)
    assert set(agreement.describe(file)) == {"weights"}


@pytest.mark.parametrize("place", [0.01, 0.3, 0.77, 1.0])
def test_any_other_byte_of_a_file_is_seen(file, place):
    before = agreement.describe(file)
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    file.write_bytes(data)
    assert agreement.describe(file) != before


def test_another_end_token_is_seen(tmp_path, file):
    other = write(tmp_path / "other.gguf", **{"tokenizer.ggml.eos_token_id": 0})
    assert other.stat().st_size == file.stat().st_size
    assert agreement.describe(other) != agreement.describe(file)


def test_the_head_split_beside_a_file_is_seen(tmp_path, file):
    found = []
    for kept in (0, 1):
        store.write(tmp_path / "model.razor.json", HeadSplit(((kept,), ()), 2))
        found.append(agreement.describe(file))
    assert set(found[0]) == {"weights", "razor.json"}
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["razor.json"] != found[1]["razor.json"]
