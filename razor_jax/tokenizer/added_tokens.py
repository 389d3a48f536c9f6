"""Tokens that a checkpoint names outside tokenizer.json, with the ids that transformers gives them.

transformers (5.24) adds them to the vocabulary of tokenizer.json in this order: `added_tokens_decoder` by id, named
special tokens, `additional_special_tokens`. A token of the vocabulary keeps its id. Another token gets the next free
id, whatever id its file states. special_tokens_map.json and added_tokens.json are legacy files: they count only if
tokenizer_config.json has no `added_tokens_decoder`.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_EXTRA, _ADDITIONAL = "extra_special_tokens", "additional_special_tokens"  # New and old name of one field.


@dataclasses.dataclass(frozen=True)
class AddedTokens:
    """Added tokens of one checkpoint.

    Attributes:
      by_id: tokens whose file states an id, in the order of the ids.
      named: special tokens by name, such as "bos_token".
      unnamed: further special tokens.
    """

    by_id: tuple[AddedToken, ...]
    named: Mapping[str, AddedToken]
    unnamed: tuple[AddedToken, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], special_map: Mapping[str, Any], added: Mapping[str, Any]) -> AddedTokens:
        """Return the tokens of tokenizer_config.json, special_tokens_map.json and added_tokens.json.

        An absent file is an empty mapping. Raises ValueError with the field's name and value if it holds no token.
        """
        if "added_tokens_decoder" in config:
            special_map, added = {}, {}
        fields = {**config, **special_map}
        names = (*_NAMES, *(name for name in fields if name.endswith("_token") and name not in _NAMES))
        values = {name: fields[name] for name in names if isinstance(fields.get(name), str | Mapping)}
        unnamed = []
        for group in _groups(config, special_map):
            if isinstance(group, Mapping):
                values |= group
            else:
                unnamed += [_token(_ADDITIONAL, value) for value in group]
        named = {name: _token(name, value) for name, value in values.items()}
        for token in named.values():
            token.special = True
        special = {token.content for token in (*named.values(), *unnamed)}
        stated = config.get("added_tokens_decoder") or {}
        if not isinstance(stated, Mapping):
            raise ValueError(f"added_tokens_decoder={stated!r}: must be an object of id -> token")
        by_id = [
            (_number("added_tokens_decoder", number), _token("added_tokens_decoder", value))
            for number, value in stated.items()
        ] + [
            (
                _number("added_tokens.json", number),
                AddedToken(content, normalized=content not in special, special=content in special),
            )
            for content, number in added.items()
        ]
        by_id.sort(key=lambda pair: pair[0])
        return cls(tuple(token for _, token in by_id), named, tuple(unnamed))

    def missing(self, tokenizer: Tokenizer) -> list[AddedToken]:
        """Return the tokens that `tokenizer` lacks or has with other flags, in the order of their ids."""
        present = tokenizer.get_added_tokens_decoder().values()
        same = {repr(token) for token in present}
        new = [token for token in self.by_id if repr(token) not in same]
        names = {token.content for token in self.named.values()}
        for token in new:
            token.special = token.special or token.content in names
        contents = {token.content for token in (*present, *new)}
        for token in (*self.named.values(), *self.unnamed):
            if token.content not in contents:
                contents.add(token.content)
                new.append(token)
        return new


def _groups(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> list[Any]:
    """Return lists or mappings of further special tokens; the old name counts where the new one is absent."""
    groups = [config.get(_EXTRA) or config.get(_ADDITIONAL), special_map.get(_EXTRA)]
    if not any(isinstance(group, list) for group in groups):
        groups.append(special_map.get(_ADDITIONAL))
    for group in groups:
        if not isinstance(group, list | Mapping | types.NoneType):
            raise ValueError(f"{_ADDITIONAL}={group!r}: must be a list of tokens")
    return [group for group in groups if group is not None]


def _number(field: str, value: Any) -> int:
    """Return a token id, which JSON may hold as text."""
    if not isinstance(value, int) and not str(value).isdecimal():
        raise ValueError(f"{field} has id {value!r}: must be a whole number")
    return int(value)


def _token(field: str, value: Any) -> AddedToken:
    """Return the token that a JSON value describes: its content, or a dictionary of content and flags."""
    try:
        if isinstance(value, str):
            return AddedToken(value, special=True)
        return AddedToken(value["content"], **{flag: value[flag] for flag in _FLAGS if flag in value})
    except (TypeError, KeyError) as error:
        raise ValueError(
            f'{field} has {value!r}: a token is a string or {{"content": string, "special": true, …}}'
        ) from error
