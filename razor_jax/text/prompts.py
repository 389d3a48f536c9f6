"""Conversion of prompts in any form to padded token arrays with few distinct shapes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ..models.config import ModelConfig
from ..params import Params
from ..tokenizer import questions
from ..tokenizer.assets import Assets

Part = Literal["whole", "document", "question"]
_BY_PART = {"whole": questions.prompt_ids, "document": questions.document_ids, "question": questions.question_ids}


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A batch of prompts as token ids. `single`: it was given as one prompt, not as a list."""

    rows: tuple[tuple[int, ...], ...]
    single: bool

    @property
    def longest(self) -> int:
        return max(len(row) for row in self.rows)


def encode(
    params: Params,
    prompt: Any,
    *,
    part: Part = "whole",
    raw: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    what: str = "prompt",
) -> Prompts:
    """Return the token ids of a string, list of strings, chat-message list, list of those, or token array(s).

    Args:
      part: what a string is: the whole prompt; a document that questions will follow; or a question that follows such
        a cached document, which gets no beginning-of-text token. Messages are the same: a document's are followed by a
        user's question, a question's begin with one. Messages that end with an assistant's are continued there.
      raw: leave strings as they are; by default the chat template, if there is one, turns them into a user's turn.
      template_kwargs: further names that the chat template reads, such as `enable_thinking`.
      what: name of the argument in errors.

    Raises ValueError or TypeError for a prompt that is empty or blank, of a wrong type, or has token ids outside the
    vocabulary, and TypeError for what are no params.
    """
    check_params(params)
    if not isinstance(template_kwargs, Mapping | None):
        raise TypeError(f'template_kwargs={template_kwargs!r}: give a dict, such as {{"enable_thinking": False}}')
    single, items = _items(prompt, what)
    if not items:
        raise ValueError(f"{what} has no rows: a batch has at least 1 prompt")
    rows = tuple(tuple(_encode(params.assets, item, part, raw, template_kwargs, what)) for item in items)
    for index, row in enumerate(rows):
        name = what if single else f"{what} {index}"
        if not row:
            raise ValueError(f"{name} is empty: give at least one token")
        low, high = min(row), max(row)
        if low < 0 or high >= params.config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"{name} has token id {bad}, outside the vocabulary 0..{params.config.vocab_size - 1}")
    return Prompts(rows, single)


def check_params(params: Any) -> None:
    """Raise TypeError for anything but `Params`, such as the name of a model."""
    if not isinstance(params, Params):
        raise TypeError(f"params is a {type(params).__name__}: give what razor_jax.load('razor-mini') returns")


def pad(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows padded on the right, int32 [B, length], and their lengths int32 [B]."""
    tokens = np.zeros((len(rows), length), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tokens, np.asarray([len(row) for row in rows], np.int32)


def prompt_bucket(tokens: int) -> int:
    """Return the padded length of a prompt: 16, 64, or a power of two from 256. Padding costs memory, not time."""
    for small in (16, 64):
        if tokens <= small:
            return small
    return max(256, 1 << (tokens - 1).bit_length())


def capacity_bucket(tokens: int) -> int:
    """Return the cache capacity for `tokens` per row: from 64, two steps per octave; from 512, eight, to waste less."""
    power = max(64, 1 << (tokens - 1).bit_length())
    rung = power // 16 if power > 512 else power // 4
    return max(64, -(-tokens // rung) * rung)


def warn_beyond_trained(config: ModelConfig, tokens: int) -> None:
    """Warn if there are more tokens than positions that the checkpoint was trained for."""
    if tokens > config.max_position_embeddings:
        warnings.warn(
            f"{tokens:,} tokens go beyond the {config.max_position_embeddings:,} positions that this checkpoint "
            "declares (max_position_embeddings): answers may degrade",
            stacklevel=3,
        )


def _items(prompt: Any, what: str) -> tuple[bool, list[Any]]:
    """Return whether `prompt` is a single prompt, and the list of prompts."""
    if isinstance(prompt, str) or _is_chat(prompt):
        return True, [prompt]
    if hasattr(prompt, "ndim"):
        if prompt.ndim not in (1, 2) or not np.issubdtype(np.dtype(prompt.dtype), np.integer):
            raise TypeError(
                f"{what} is an array of shape {tuple(prompt.shape)} and type {prompt.dtype}: token ids are integers, "
                "[T] for one prompt or [B, T] for several"
            )
        return prompt.ndim == 1, [np.asarray(prompt)] if prompt.ndim == 1 else list(np.asarray(prompt))
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        if not len(prompt):
            raise ValueError(f"{what} is an empty list: a batch has at least 1 prompt")
        if all(isinstance(item, (int, np.integer)) for item in prompt):
            return True, [np.asarray(prompt)]
        return False, list(prompt)
    raise TypeError(
        f"{what} is a {type(prompt).__name__}: give a string, a list of strings, chat messages "
        '([{"role": "user", "content": …}]), or token ids'
    )


def _is_chat(item: Any) -> bool:
    return isinstance(item, Sequence) and len(item) > 0 and all(isinstance(m, Mapping) for m in item)


def _encode(
    assets: Assets | None, item: Any, part: Part, raw: bool, template_kwargs: Mapping[str, Any] | None, what: str
) -> list[int]:
    if isinstance(item, str) or _is_chat(item):
        if assets is None:
            raise ValueError(
                "these params have no tokenizer, so a prompt must be token ids; "
                "give Params.from_flax(…, tokenizer=Assets.read(folder)) for text"
            )
        if not isinstance(item, str):
            return _BY_PART[part](assets, item, template_kwargs)
        if not item:
            return []
        rendered = any(item.startswith(text) for _, text in assets.special_tokens if text)
        plain = raw or assets.chat_template is None
        if not (plain or item.strip()):
            raise ValueError(f"a prompt is {item!r}: give a message, or raw=True to continue blank text")
        if plain or rendered:
            _refuse_variables(template_kwargs, "text that is continued as it is")
            # Text that begins with a special token was rendered before: a second one would be too many.
            return assets.encode(item, add_special=part != "question" and not rendered)
        return _BY_PART[part](assets, item, template_kwargs)
    array = np.asarray(item)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise TypeError(
            f"a prompt in the list is a {type(item).__name__}: give strings, chat-message lists or integer token ids"
        )
    if what != "draft_from":  # the ids of a document whose question may have variables
        _refuse_variables(template_kwargs, "token ids")
    return [int(token) for token in array]


def _refuse_variables(template_kwargs: Mapping[str, Any] | None, what: str) -> None:
    if template_kwargs:
        raise ValueError(
            f"template_kwargs={dict(template_kwargs)!r}: no chat template reads them with {what}; leave them out"
        )
