"""Grammars that an answer must follow, by llguidance."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import numpy as np

from ..tokenizer.assets import Assets
from .errors import ApiError

# Free white space lets a small model emit line breaks for ever.
JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class TokenGrammar:
    """A grammar and the position in it of one answer. Satisfies `generation.Grammar`."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, grammar: str):
        self._matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        self._vocab_size = tokenizer.vocab_size

    def mask(self) -> np.ndarray:
        """Return which tokens may come next, bool [V]; end tokens only where the text may end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_sound()
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)

    def accept(self, token: int) -> None:
        """Move past a token that was chosen. Raises ValueError if the grammar does not allow it."""
        self._matcher.consume_token(token)
        self._require_sound()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar of the answer failed: {self._matcher.get_error()}")


class Grammars:
    """Maker of grammars for one tokenizer."""

    def __init__(self, assets: Assets, vocab_size: int):
        self._assets, self._vocab_size = assets, vocab_size

    @functools.cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(
            self._assets.tokenizer_json or "", n_vocab=self._vocab_size, eos_token=list(self._assets.eos_ids)
        )

    def json_object(self) -> str:
        """Return the grammar of any JSON object."""
        return self.json_schema({"type": "object"}, "response_format")

    def json_schema(self, schema: Mapping[str, Any] | bool, param: str) -> str:
        """Return the grammar of a JSON schema. Raises ApiError for a schema that llguidance cannot follow."""
        text = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)
        return self._checked(text, param)

    def lark(self, text: str, param: str) -> str:
        """Return a grammar in Lark's notation."""
        return self._checked(llguidance.LLMatcher.grammar_from_lark(text), param)

    def start(self, grammar: str) -> TokenGrammar:
        """Return the grammar at its beginning."""
        return TokenGrammar(self._tokenizer, grammar)

    def _checked(self, grammar: str, param: str) -> str:
        failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        if failed:
            raise ApiError(f"the schema cannot be followed: {messages[0]}", param=param, code="invalid_schema")
        return grammar


def object_schema(properties: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """Return the JSON schema of an object with these properties only."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }
