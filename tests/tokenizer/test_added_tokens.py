"""Tokens named outside tokenizer.json get the ids, flags and texts that transformers gives them."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from razor_jax.tokenizer.assets import Assets

from .test_tokenizer import ASSETS

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEXT = "<|im_start|>user\nthe fox<|im_end|> <img><tool> a</s>[PAD]"


def token(content: str, **flags: bool) -> dict:
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, **flags}


def config(**fields) -> dict:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": CHATML, **fields}


SPECIAL = {"special": True}
FOLDERS = {
    "added_tokens_decoder": {
        "tokenizer_config": config(
            added_tokens_decoder={
                "401": token("<|im_end|>", **SPECIAL),
                "400": token("<|im_start|>", **SPECIAL),
                "402": token("<tool>", special=False),
            }
        )
    },
    "ids that are not the next ones": {
        "tokenizer_config": config(added_tokens_decoder={"9000": token("<|im_start|>", **SPECIAL)})
    },
    "ids before those of named tokens": {
        "tokenizer_config": config(
            pad_token="[PAD]", added_tokens_decoder={"400": token("<|im_end|>", **SPECIAL), "401": token("<tool>")}
        )
    },
    "other flags than tokenizer.json": {
        "tokenizer_config": config(added_tokens_decoder={"1": token("</s>", lstrip=True, special=False)})
    },
    "a word of the vocabulary": {"tokenizer_config": config(added_tokens_decoder={"300": token("the")})},
    "additional_special_tokens": {
        "tokenizer_config": config(pad_token="[PAD]", additional_special_tokens=["<|im_start|>", "<|im_end|>", "</s>"])
    },
    "additional tokens with flags": {
        "tokenizer_config": config(
            additional_special_tokens=[{"__type": "AddedToken", **token("<|im_end|>", lstrip=True)}, "<|im_start|>"]
        )
    },
    "extra_special_tokens": {"tokenizer_config": config(extra_special_tokens=["<|im_start|>", "<|im_end|>"])},
    "extra tokens by name": {
        "tokenizer_config": config(extra_special_tokens={"image_token": "<img>", "end": "<|im_end|>"})
    },
    "a name of its own": {"tokenizer_config": config(image_token="<img>", pad_token="[PAD]", add_bos_token=False)},
    "added_tokens.json": {
        "tokenizer_config": config(),
        "added_tokens": {"<|im_end|>": 401, "<|im_start|>": 400, "<tool>": 402},
    },
    "added_tokens.json with special ones": {
        "tokenizer_config": config(additional_special_tokens=["<|im_start|>"], pad_token="<|im_end|>"),
        "added_tokens": {"<|im_end|>": 401, "<|im_start|>": 400, "<tool>": 402},
    },
    "special_tokens_map.json over tokenizer_config.json": {
        "tokenizer_config": config(pad_token="[PAD]"),
        "special_tokens_map": {
            "eos_token": token("<|im_end|>"),
            "additional_special_tokens": ["<|im_start|>", "<img>"],
        },
    },
    "special_tokens_map.json alone": {
        "special_tokens_map": {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]}
    },
    "both special_tokens_map.json and extra tokens": {
        "tokenizer_config": config(extra_special_tokens=["<img>"]),
        "special_tokens_map": {"extra_special_tokens": ["<|im_start|>", "<img>"]},
    },
    "legacy files beside added_tokens_decoder": {
        "tokenizer_config": config(added_tokens_decoder={"400": token("<|im_start|>", **SPECIAL)}),
        "special_tokens_map": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<img>"]},
        "added_tokens": {"<tool>": 401},
    },
}


@pytest.fixture(params=["byte_level", "metaspace"])
def folder(request, tmp_path):
    (tmp_path / "tokenizer.json").write_text(ASSETS[request.param].tokenizer_json, encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS.keys())
def test_added_tokens_as_transformers(folder, files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    theirs, ours = AutoTokenizer.from_pretrained(folder), Assets.read(folder)
    assert dict(ours.special_tokens) == theirs.special_tokens_map
    written = Tokenizer.from_str(ours.tokenizer_json).get_added_tokens_decoder()
    assert {i: repr(t) for i, t in written.items()} == {i: repr(t) for i, t in theirs.added_tokens_decoder.items()}
    assert ours.vocab_size == len(theirs)
    for text in (TEXT, "plain the fox"):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
    assert theirs.eos_token_id in ours.eos_ids
    ours.write(folder / "copy")
    assert Assets.read(folder / "copy") == ours
    assert AutoTokenizer.from_pretrained(folder / "copy")(TEXT)["input_ids"] == ours.encode(TEXT)


def test_chatml_is_read_as_its_tokens(folder):
    """A count by hand: without the added tokens, each mark is several pieces of text."""
    (folder / "tokenizer_config.json").write_text(json.dumps(FOLDERS["added_tokens_decoder"]["tokenizer_config"]))
    assets = Assets.read(folder)
    ids = assets.encode(assets.apply_chat([{"role": "user", "content": "fox"}]), add_special=False)
    start, end = (
        Tokenizer.from_str(assets.tokenizer_json).token_to_id(mark) for mark in ("<|im_start|>", "<|im_end|>")
    )
    assert ids[0] == start
    assert ids.count(end) == 1
    assert not {start, end} & set(assets.encode("user\nfox", add_special=False))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"added_tokens_decoder": {"4": "<a>", "5": {"special": True}}},
            r"added_tokens_decoder has \{'special': True\}",
        ),
        ({"eos_token": {"content": 5}}, r"eos_token has \{'content': 5\}: a token is a string or"),
        ({"additional_special_tokens": [7]}, "additional_special_tokens has 7"),
        ({"additional_special_tokens": "<a>"}, "additional_special_tokens='<a>': must be a list"),
        ({"added_tokens_decoder": ["<a>"]}, r"added_tokens_decoder=\['<a>'\]: must be an object"),
        ({"added_tokens_decoder": {"four": "<a>"}}, "added_tokens_decoder has id 'four'"),
    ],
)
def test_fields_without_tokens_are_named(folder, fields, message):
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        Assets.read(folder)


def test_files_without_an_object_are_named(folder):
    (folder / "added_tokens.json").write_text('["<a>"]')
    with pytest.raises(ValueError, match=r"added_tokens\.json: holds a JSON list, expected an object"):
        Assets.read(folder)
    (folder / "added_tokens.json").write_text('{"<a>": "first"}')
    with pytest.raises(ValueError, match=r"added_tokens\.json has id 'first'"):
        Assets.read(folder)
