"""A tokenizer.json, chat template and stop tokens from the metadata of a GGUF file."""

from __future__ import annotations

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from ..tokenizer.assets import Assets
from .gguf_header import Header, short

_CONTROL, _USER_DEFINED = 3, 4  # token types
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _WORDS % r"\p{N}{1,3}", _WORDS % r"\p{N}"
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_AT = "tokenizer.ggml."
# Fields that are read here, or that change nothing in a byte-level BPE.
_READ = ("ggml.model", "ggml.pre", "ggml.tokens", "ggml.token_type", "ggml.merges", "ggml.add_bos_token")
_READ += ("ggml.add_eos_token", "ggml.*_token_id", "ggml.scores", "ggml.token_type_count", "chat_template*")
_READ += ("huggingface.json",)
_NEUTRAL = {f"ggml.{name}": (False,) for name in ("add_space_prefix", "add_sep_token", "remove_extra_whitespaces")}


def assets_of(header: Header) -> Assets:
    """Return the assets of a file, none if it has no tokenizer.

    Raises ValueError that names the field of a tokenizer that is damaged or not supported.
    """
    kind, tokens = header.field(f"{_AT}model", str, None), header.field(f"{_AT}tokens", list, None)
    if kind is None and tokens is None:
        return Assets()
    if kind != "gpt2":
        raise header.error(
            f"{_AT}model",
            "not supported: only byte-level BPE ('gpt2') is; put the model's tokenizer.json into a folder with "
            "safetensors, or pass token ids",
        )
    tokens = header.field(f"{_AT}tokens", list)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None and len(tokens) > embedding.shape[0]:
        raise ValueError(
            f"{header.path}: {_AT}tokens has {len(tokens):,} tokens: must be at most {embedding.shape[0]:,}, the rows "
            "of token_embd.weight; use another file"
        )
    header.refuse_unread("tokenizer.", _READ, _NEUTRAL)

    def token(name: str) -> int | None:
        number = header.field(f"{_AT}{name}_token_id", int, None)
        if number is not None and number >= len(tokens):
            raise header.error(f"{_AT}{name}_token_id", f"must be below {len(tokens):,}, the number of tokens")
        return number

    ids = {name: token(key) for name, key in _NAMES.items()}
    ends = [i for i in (ids["eos_token"], token("eot"), token("eom")) if i is not None]
    pre = header.field(f"{_AT}pre", str, "default")
    tokenizer = _bpe(header, tokens, pre)
    _add_tokens(header, tokenizer, tokens)
    _add_template(header, tokenizer, tokens, adds_bos=pre == "llama-bpe" and ids["bos_token"] is not None)
    return Assets(
        tokenizer_json=tokenizer.to_str(),
        chat_template=header.field("tokenizer.chat_template", str, None),
        bos_id=ids["bos_token"],
        eos_ids=tuple(dict.fromkeys(ends)),
        special_tokens=tuple((name, tokens[i]) for name, i in ids.items() if i is not None),
    )


def _add_tokens(header: Header, tokenizer: Tokenizer, tokens: list[str]) -> None:
    """Add the control and user-defined tokens, which are matched in the text before anything else."""
    types = header.field(f"{_AT}token_type", np.ndarray, None)
    if types is None:
        return
    if len(types) != len(tokens):
        raise ValueError(
            f"{header.path}: {_AT}token_type has {len(types):,} entries: must be {len(tokens):,}, one per token; use "
            "another file"
        )
    for kind, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        # A token whose text comes again later keeps no id of its own.
        texts = [tokens[i] for i in np.flatnonzero(types == kind) if tokenizer.token_to_id(tokens[i]) == i]
        add([AddedToken(text, normalized=False, special=kind == _CONTROL) for text in texts])


def _add_template(header: Header, tokenizer: Tokenizer, tokens: list[str], adds_bos: bool) -> None:
    """Make the tokenizer add BOS and EOS where the file asks for it; `adds_bos` is the default."""
    specials = []
    for name, default in (("bos", adds_bos), ("eos", False)):
        if header.field(f"{_AT}add_{name}_token", bool, default):
            number = header.field(f"{_AT}{name}_token_id", int)
            specials.append({"id": name, "ids": [number], "tokens": [tokens[number]]})
    if not specials:
        return
    # Labelled "bos" and "eos": a token's own text can be template syntax, such as "$A" or "<s> x".
    labels = [special["id"] for special in specials]
    text = " ".join(part for part in ("bos", "{}", "eos") if part == "{}" or part in labels)
    template = processors.TemplateProcessing(
        single=text.format("$A"), pair=f"{text} {text}".format("$A", "$B"), special_tokens=specials
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])


def _bpe(header: Header, tokens: list[str], pre: str) -> Tokenizer:
    """Return a byte-level BPE tokenizer; `pre` names how text is cut into words first."""
    merges = header.field(f"{_AT}merges", list)
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    missing = next((part for pair in pairs for part in (*pair, "".join(pair)) if part not in vocabulary), None)
    if missing is not None:
        raise ValueError(
            f"{header.path}: {_AT}merges needs the token {short(missing)}, which {_AT}tokens lacks; use another file"
        )
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
        raise header.error(f"{_AT}pre", f"not supported; use a file with {', '.join(known)}")
    tokenizer.pre_tokenizer = known[pre]()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer
