"""Tokenizers of GGUF files: ids against a literal BPE and transformers, special tokens, what is refused by name."""

from __future__ import annotations

import collections
import itertools
import unicodedata

import numpy as np
import pytest
import regex
import transformers
from tokenizers import pre_tokenizers

import razor_jax
from razor_jax.checkpoint import gguf

from ..support.gguf_files import CORPUS, MERGES, WORDS, smollm2, tokenizer_fields, tokens_of, write

AT = "tokenizer.ggml."
# The regular expressions of llama.cpp; each cuts the pieces of the one before it.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS_OF = {
    "default": (GPT2,),
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (LLAMA3,),
    "qwen2": (LLAMA3.replace("{1,3}", ""),),
}


def byte_letters() -> dict[int, str]:
    """GPT-2's letter of each byte: printable ones are their own, the others follow at 256."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in own)
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + i) for i, byte in enumerate(others)}


LETTERS = byte_letters()


def cut(text: str, patterns: tuple[str, ...]) -> list[str]:
    """Pieces of a text: matches, and what is between them."""
    pieces = [text]
    for pattern in patterns:
        pieces = [part for piece in pieces for part in regex.split(f"({pattern})", piece) if part]
    return pieces


def literal(text: str, pre: str, tokens: list[str], merges: list[str]) -> list[int]:
    """Token ids by definition: cut, then join the pair of the lowest rank until none is known."""
    ids = {token: number for number, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    if pre == "qwen2":
        text = unicodedata.normalize("NFC", text)
    found = []
    for word in cut(text, WORDS_OF[pre]):
        parts = [LETTERS[byte] for byte in word.encode()]
        if pre == "llama-bpe" and "".join(parts) in ids:
            parts = ["".join(parts)]
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, np.inf), i) for i, pair in enumerate(itertools.pairwise(parts)))
            if rank == np.inf:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found += [ids[part] for part in parts]
    return found


def merges_of(texts: tuple[str, ...], count: int) -> list[str]:
    """Merges that cross words and numbers, so that every cut shows in the ids."""
    rows = [[LETTERS[byte] for byte in text.encode()] for text in texts]
    merges: list[str] = []
    for _ in range(count):
        pairs = collections.Counter(pair for row in rows for pair in itertools.pairwise(row))
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        merges.append(f"{left} {right}")
        for row in rows:
            i = 0
            while i < len(row) - 1:
                if (row[i], row[i + 1]) == (left, right):
                    row[i : i + 2] = [left + right]
                i += 1
    return merges


TRAINED = merges_of((*(unicodedata.normalize("NFC", text) for text in CORPUS), "12345678 " * 3), 120)


def assets(path, **changes):
    return gguf.read_assets(write(path / "model.gguf", **changes))


@pytest.mark.parametrize("pre", WORDS_OF)
def test_ids_are_those_of_a_literal_bpe(tmp_path, pre):
    found = assets(tmp_path, rows=500, **tokenizer_fields(pre, TRAINED))
    for text in CORPUS:
        assert list(found.encode(text, add_special=False)) == literal(text, pre, tokens_of(TRAINED), TRAINED)


def test_the_corpus_tells_the_ways_to_cut_apart():
    ids = {pre: [tuple(literal(t, pre, tokens_of(TRAINED), TRAINED)) for t in CORPUS] for pre in WORDS_OF}
    assert ids.pop("gpt-2") == ids["default"]
    assert len(set(map(tuple, ids.values()))) == len(ids)


def test_a_whole_word_of_llama_bpe_needs_no_merges(tmp_path):
    tokens = [*tokens_of(), "Ġxyz"]
    fields = {f"{AT}tokens": tokens, f"{AT}token_type": [1] * len(tokens)}
    for pre, whole in (("llama-bpe", True), ("gpt-2", False)):
        found = assets(tmp_path, rows=500, **tokenizer_fields(pre) | fields).encode("a xyz", add_special=False)
        assert found == literal("a xyz", pre, tokens, MERGES)
        assert (found[-1] == len(tokens) - 1) == whole


@pytest.mark.parametrize("pre", ["default", "llama-bpe", "qwen2"])
def test_ids_are_those_of_transformers(tmp_path, pre):
    found = assets(tmp_path, **tokenizer_fields(pre))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in (*CORPUS, "<|im_start|>user\nhi<|im_end|>"):
        text = unicodedata.normalize("NFC", text)  # transformers lacks Qwen's normalizer
        assert list(found.encode(text, add_special=False)) == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("bos", [None, False, True])
@pytest.mark.parametrize("eos", [None, False, True])
def test_bos_and_eos_are_added_as_in_transformers(tmp_path, bos, eos):
    found = assets(tmp_path, **{f"{AT}add_bos_token": bos, f"{AT}add_eos_token": eos})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert list(found.encode("the inner")) == theirs("the inner").input_ids
    assert found.add_bos == bool(bos)
    pair = found._backend.encode("the", "inner").ids
    assert pair == theirs("the", "inner").input_ids


def test_llama_bpe_adds_bos_unless_the_file_says_otherwise(tmp_path):
    for bos, adds in ((None, True), (False, False)):
        assert assets(tmp_path, **{**tokenizer_fields("llama-bpe"), f"{AT}add_bos_token": bos}).add_bos == adds
    fields = {f"{AT}add_bos_token": None, f"{AT}bos_token_id": None}
    assert not assets(tmp_path, **{**tokenizer_fields("llama-bpe"), **fields}).add_bos


@pytest.mark.parametrize("text", ["$A", "<s> x", "$B:1", "a:0", "bos", " "])
def test_a_bos_of_any_text_is_added(tmp_path, text):
    tokens = tokens_of()
    tokens[1] = text
    found = assets(tmp_path, **{f"{AT}tokens": tokens, f"{AT}add_bos_token": True, f"{AT}add_eos_token": True})
    assert found.encode("the") == [1, *found.encode("the", add_special=False), 2]


def test_every_end_of_turn_ends_an_answer(tmp_path):
    found = assets(tmp_path, **{f"{AT}eot_token_id": 0, f"{AT}eom_token_id": 2})
    assert found.eos_ids == (2, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "ggml.model='t5': not supported: only byte-level BPE"),
        ({"model": 5}, "ggml.model=5: must be a string"),
        ({"model": None}, "ggml.model=None: not supported: only byte-level BPE"),
        ({"pre": "deepseek"}, "ggml.pre='deepseek': not supported; use a file with default, gpt-2, smollm"),
        ({"pre": ["a"]}, r"ggml.pre=\['a'\]: must be a string"),
        ({"tokens": 5}, "ggml.tokens=5: must be a list of strings"),
        ({"tokens": [1, 2]}, r"ggml.tokens=\[1, 2\]: must be a list of strings"),
        ({"tokens": None}, "ggml.tokens is missing: it must be a list of strings"),
        ({"tokens": [*tokens_of(), "x"]}, "ggml.tokens has 266 tokens: must be at most 265, the rows of token_embd"),
        ({"token_type": 5}, "ggml.token_type=5: must be a list of whole numbers"),
        ({"token_type": ["a"]}, r"ggml.token_type=\['a'\]: must be a list of whole numbers"),
        ({"token_type": [3, 3]}, "ggml.token_type has 2 entries: must be 265, one per token"),
        ({"merges": 7}, "ggml.merges=7: must be a list of strings"),
        ({"merges": None}, "ggml.merges is missing: it must be a list of strings"),
        (
            {"merges": ["h e", "zz" * 99 + " e"]},
            r"ggml.merges needs the token 'z+\.\.\.z+', which tokenizer.ggml.tokens",
        ),
        ({"merges": ["he"]}, "ggml.merges needs the token '', which tokenizer.ggml.tokens lacks"),
        ({"bos_token_id": "x"}, "ggml.bos_token_id='x': must be a whole number, 0 or more"),
        ({"eos_token_id": 1.5}, "ggml.eos_token_id=1.5: must be a whole number"),
        ({"eos_token_id": 265}, "ggml.eos_token_id=265: must be below 265, the number of tokens"),
        ({"eot_token_id": 1000}, "ggml.eot_token_id=1000: must be below 265"),
        ({"eom_token_id": 1000}, "ggml.eom_token_id=1000: must be below 265"),
        ({"padding_token_id": 2**32 - 1}, "ggml.padding_token_id=4294967295: must be below 265"),
        ({"add_bos_token": 1}, "ggml.add_bos_token=1: must be true or false"),
        ({"add_bos_token": True, "bos_token_id": None}, "ggml.bos_token_id is missing"),
        ({"add_eos_token": True, "eos_token_id": None}, "ggml.eos_token_id is missing"),
        ({"add_space_prefix": True}, "add_space_prefix' is True, which is not supported: it must be False or absent"),
        ({"precompiled_charsmap": [1, 2]}, r"precompiled_charsmap' is \[1, 2\], .* it must be absent"),
    ],
    ids=str,
)
def test_wrong_fields_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        assets(tmp_path, **{AT + name: value for name, value in changes.items()})
    assert str(error.value).startswith(f"{tmp_path}/model.gguf: ")
    assert len(str(error.value)) < len(str(tmp_path)) + 260


def test_a_chat_template_is_a_string(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.chat_template=5: must be a string"):
        assets(tmp_path, **{"tokenizer.chat_template": 5})
    assert assets(tmp_path, **{"tokenizer.chat_template": "{{ x }}"}).chat_template == "{{ x }}"


def test_no_tokenizer_is_none(tmp_path):
    nothing = dict.fromkeys(tokenizer_fields("default"))
    params = razor_jax.load(write(tmp_path / "model.gguf", **nothing), heads=None)
    assert params.assets.tokenizer_json is None


def test_byte_letters_are_those_of_the_library():
    assert sorted(LETTERS.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert tokens_of()[:3] == WORDS


def test_smollm2_is_a_literal_bpe_that_splits_digits():
    path = smollm2()
    metadata = gguf.read_header(path).metadata
    found = gguf.read_assets(path)
    for text in CORPUS:
        want = literal(text, "smollm", metadata[f"{AT}tokens"], metadata[f"{AT}merges"])
        assert list(found.encode(text, add_special=False)) == want
