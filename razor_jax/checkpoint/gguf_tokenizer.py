"""A tokenizer.json, chat template and stop tokens from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from ..tokenizer.assets import Assets

_CONTROL, _USER_DEFINED = 3, 4  # token types
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _WORDS % r"\p{N}{1,3}", _WORDS % r"\p{N}"
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def assets_of(metadata: Mapping[str, Any], path: Path) -> Assets:
    """Return the assets of a file's metadata. Raises ValueError that names a tokenizer that is not supported."""

    def field(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    kind, tokens = field("model"), field("tokens")
    if kind is None or not tokens:
        return Assets()
    if kind != "gpt2":
        raise ValueError(
            f"{path}: tokenizer.ggml.model={kind!r} is not supported: only byte-level BPE ('gpt2') is; put the model's "
            "tokenizer.json into a folder with safetensors, or pass token ids"
        )
    ids = {name: field(f"{key}_token_id") for name, key in _NAMES.items()}
    for name, number in ids.items():
        if number is not None and not 0 <= number < len(tokens):
            raise ValueError(f"{path}: {name} has id {number}, there are {len(tokens)} tokens")
    tokenizer = _bpe(tokens, field("merges", []), field("pre", "default"), path)
    types = field("token_type", [])
    for number, (token, token_type) in enumerate(zip(tokens, types, strict=False)):
        if token_type in (_CONTROL, _USER_DEFINED) and tokenizer.token_to_id(token) == number:
            control = token_type == _CONTROL
            added = AddedToken(token, normalized=False, special=control)
            (tokenizer.add_special_tokens if control else tokenizer.add_tokens)([added])
    bos, adds_bos = ids["bos_token"], field("add_bos_token", field("pre") == "llama-bpe")
    if adds_bos and bos is not None:
        begin = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A {tokens[bos]} $B", special_tokens=[(tokens[bos], bos)]
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    ends = dict.fromkeys(i for i in (ids["eos_token"], field("eot_token_id"), field("eom_token_id")) if i is not None)
    return Assets(
        tokenizer_json=tokenizer.to_str(),
        chat_template=metadata.get("tokenizer.chat_template"),
        bos_id=bos,
        eos_ids=tuple(ends),
        special_tokens=tuple((name, tokens[i]) for name, i in ids.items() if i is not None),
    )


def _bpe(tokens: list[str], merges: list[str], pre: str, path: Path) -> Tokenizer:
    """Return a byte-level BPE tokenizer; `pre` names how text is cut into words first."""
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    missing = next((part for pair in pairs for part in (*pair, "".join(pair)) if part not in vocabulary), None)
    if missing is not None:
        raise ValueError(f"{path}: tokenizer.ggml.merges does not fit its tokens ({missing!r} is not one)")
    model = tokenizer_models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(model)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

    def split(pattern: str) -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), plain])

    known = {
        "default": lambda: words,
        "gpt-2": lambda: words,
        "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]),
        "llama-bpe": lambda: split(_LLAMA3),
        "qwen2": lambda: split(_QWEN2),
    }
    if pre not in known:
        raise ValueError(f"{path}: tokenizer.ggml.pre={pre!r} is not supported: {', '.join(known)} are")
    tokenizer.pre_tokenizer = known[pre]()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer
