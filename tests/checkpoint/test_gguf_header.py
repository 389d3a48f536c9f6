"""Headers of GGUF files from strangers: cut short, damaged, hostile, of wrong types. Nothing large is made of them."""

from __future__ import annotations

import re
import struct
import tracemalloc

import numpy as np
import pytest

from razor_jax.checkpoint import gguf_header
from razor_jax.checkpoint.gguf_header import Header, read_header, short

from ..support.gguf_files import edited, write


def header_of(path, fields: bytes = b"", count: int = 0, tensors: bytes = b"", tensor_count: int = 0, end: int = 64):
    """A file of a header and some bytes of data."""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensor_count, count) + fields + tensors + bytes(end))
    return path


def name(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def tensor(text: str, size: int = 1) -> bytes:
    return name(text) + struct.pack("<IQIQ", 1, size, 0, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: b"", "it has 0 bytes"),
        (lambda d: b"PK\x03\x04" + d[4:], "not a GGUF file"),
        (lambda d: edited(d, 4, "I", 1), "version 1"),
        (lambda d: edited(d, 4, "I", 3 << 24), "little-endian"),
        (lambda d: edited(d, 8, "Q", 2**60), "1,152,921,504,606,846,976 tensors are announced"),
        (lambda d: edited(d, 16, "Q", 2**60), "metadata fields are announced"),
        (lambda d: edited(d, 24, "Q", 2**62), "bytes of a string are announced"),
        (lambda d: d[:200], "cut short"),
        (lambda d: d[:-1000], "would end at byte"),
        (lambda d: d[: len(d) // 2], "would end at byte"),
    ],
)
def test_damaged_and_hostile_files_cost_nothing(tmp_path, make, message):
    path = write(tmp_path / "model.gguf")
    path.write_bytes(make(path.read_bytes()))
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as error:
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
    assert str(path) in str(error.value)


def test_dimensions_that_overflow_are_refused(tmp_path):
    path = write(tmp_path / "model.gguf")
    data = path.read_bytes()
    at = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4
    path.write_bytes(edited(edited(data, at, "Q", 2**40), at + 8, "Q", 2**40))
    with pytest.raises(ValueError, match="would end at byte"):
        read_header(path)


def test_counts_are_limited_whatever_the_size_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_header, "_ENTRIES", 9)
    with pytest.raises(ValueError, match="20 tensors are announced: at most 9 are read"):
        read_header(write(tmp_path / "a.gguf"))
    monkeypatch.setattr(gguf_header, "_ENTRIES", 20)
    monkeypatch.setattr(gguf_header, "_HEADER_BYTES", 1000)
    with pytest.raises(ValueError, match=r"265 strings of 'tokenizer.ggml.tokens' are announced: at most 125 are read"):
        read_header(write(tmp_path / "b.gguf"))
    monkeypatch.setattr(gguf_header, "_HEADER_BYTES", 3000)
    with pytest.raises(ValueError, match="the header has more than 3,000 bytes"):
        read_header(write(tmp_path / "c.gguf"))


def test_lists_of_numbers_take_the_bytes_of_the_file(tmp_path):
    count = 2_000_000
    numbers = name("x") + struct.pack("<IIQ", 9, 1, count) + bytes(count)
    path = header_of(tmp_path / "model.gguf", numbers, 1)
    tracemalloc.start()
    header = read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 3 * count
    tracemalloc.stop()
    assert header.metadata["x"].nbytes == count


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"fields": name("a") + struct.pack("<IB", 7, 1), "count": 1, "tensors": tensor("t") * 2, "tensor_count": 2},
         "tensor 't' is there twice"),
        ({"fields": (name("a") + struct.pack("<IB", 7, 1)) * 2, "count": 2}, "metadata field 'a' is there twice"),
        ({"fields": name("a") + struct.pack("<I", 99), "count": 1}, "metadata field 'a' has type 99"),
        ({"fields": name("a\n" * 999) + struct.pack("<I", 99), "count": 1}, r"field 'a\\na.{,90} has type 99"),
        ({"fields": name("a") + struct.pack("<IIQ", 9, 9, 0), "count": 1}, "'a' is an array of type 9"),
        ({"tensors": tensor("t" * 999, 2**40), "tensor_count": 1}, r"tensor 't{20,40}\.\.\.t{20,40}' .* would end at"),
        ({"tensors": name("t") + struct.pack("<IQIQ", 5, 1, 0, 0), "tensor_count": 1}, "'t' has 5 dimensions: 1 to 4"),
    ],
)  # fmt: skip
def test_what_the_header_cannot_say_is_named(tmp_path, file, message):
    path = header_of(tmp_path / "model.gguf", **file)
    with pytest.raises(ValueError, match=message) as error:
        read_header(path)
    assert len(str(error.value)) < len(str(path)) + 220


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.alignment": 3}, "general.alignment=3: must be a power of two, 1 to 1,048,576"),
        ({"general.alignment": 0}, "general.alignment=0: must be a whole number, 1 or more"),
        ({"general.alignment": 1 << 21}, "general.alignment=2097152: must be a power of two"),
        ({"general.alignment": "x"}, "general.alignment='x': must be a whole number"),
        ({"split.count": 3, "split.no": 0}, "split.count=3: this is one part of .* `llama-gguf-split --merge"),
    ],
)
def test_alignment_and_split_files(tmp_path, changes, message):
    path = write(tmp_path / "model.gguf", **changes)
    with pytest.raises(ValueError, match=message):
        read_header(path)


def test_another_alignment_moves_the_data(tmp_path):
    path = write(tmp_path / "model.gguf")
    start = min(tensor.start for tensor in read_header(path).tensors.values())
    assert start % 32 == 0
    aligned = header_of(tmp_path / "64.gguf", name("general.alignment") + struct.pack("<II", 4, 64), 1, tensor("t"), 1)
    assert read_header(aligned).tensors["t"].start == 128


@pytest.mark.parametrize("value", [True, 1, 1.5, "text", ["a"], np.arange(3), np.zeros(2, np.float32)], ids=repr)
@pytest.mark.parametrize("kind", [bool, int, float, str, list, np.ndarray])
def test_a_field_has_the_type_that_is_asked_for(tmp_path, kind, value):
    header = Header(tmp_path / "model.gguf", {"a.b": value}, {})
    integers = isinstance(value, np.ndarray) and value.dtype.kind == "i"
    if (type(value) is kind and kind is not np.ndarray) or (kind is np.ndarray and integers):
        assert header.field("a.b", kind) is value
    elif kind is float and type(value) is int:
        assert header.field("a.b", kind) == 1.0
    else:
        with pytest.raises(ValueError, match=rf"model.gguf: a.b={re.escape(short(value))}: must be "):
            header.field("a.b", kind)


@pytest.mark.parametrize(
    ("kind", "value", "least"),
    [(int, -1, 0), (int, 0, 1), (float, float("inf"), 0), (float, float("nan"), 0), (float, -0.5, 0)],
)
def test_numbers_out_of_range_are_refused(tmp_path, kind, value, least):
    header = Header(tmp_path / "model.gguf", {"a.b": value}, {})
    with pytest.raises(ValueError, match=rf"a.b={value}: must be a \w+ number, {least} or more"):
        header.field("a.b", kind, least=least)


def test_a_missing_field_has_its_default_or_is_named(tmp_path):
    header = Header(tmp_path / "model.gguf", {}, {})
    assert header.field("a.b", int, 7) == 7
    assert header.field("a.b", str, None) is None
    with pytest.raises(ValueError, match=r"model.gguf: a.b is missing: it must be a list of strings"):
        header.field("a.b", list)


@pytest.mark.parametrize("value", ["x\n" * 10**6, ["y" * 500] * 500, np.arange(10**6), 10**70, {"a": "b" * 999}])
def test_values_in_errors_are_short(value):
    assert len(short(value)) <= 80
    assert "\n" not in short(value)
