"""A conversation that keeps its cache, so each turn reads only new tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from .. import cache as kv
from ..cache import KVCache
from ..params import Params
from .policy import Policy
from .prompts import check_params
from .result import Result
from .sampling import Rule, Sampling
from .session import Piece, Session, pieces

log = logging.getLogger("razor_jax")

# Placeholder for an answer while the template is rendered.
_ANSWER = "razor-jax-answer"


class Chat:
    """A conversation in the format of the chat template of the checkpoint.

    A turn adds to the cache only the text that the template writes after the last answer: the generated tokens of
    the answer are already cached. If the template rewrites earlier turns (some drop the reasoning), the cache
    keeps them as they were first read, and one warning is logged.

    Attributes:
      messages: the conversation so far, [{"role": …, "content": …}].
    """

    def __init__(
        self,
        params: Params,
        *,
        system: str | None = None,
        razor: Policy = "auto",
        capacity: int | None = None,
    ):
        check_params(params)
        if not isinstance(system, str | None):
            raise TypeError(f"system={system!r}: give a text, or None for no system message")
        self._params, self._capacity = params, capacity
        self._razor: Policy = razor
        self._system = system
        self.reset()

    def __repr__(self) -> str:
        return f"Chat({len(self.messages)} messages, {len(self._tokens):,} tokens read and generated)"

    def reset(self) -> None:
        """Reset the conversation to the system message."""
        self.messages: list[dict[str, str]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self._cache: KVCache | None = None
        # All tokens read or generated. The cache lacks the last one.
        self._tokens: list[int] = []
        self._warned_of_rewrite = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens of the conversation, as the model has read or generated them."""
        return tuple(self._tokens)

    def send(
        self,
        text: str,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | Rule | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Result:
        """Send the text of the user and return the answer. Bad input raises and leaves the conversation unchanged."""
        result = None
        for piece in self.stream(text, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=stop):
            result = piece.result
        assert result is not None
        return result

    def stream(
        self,
        text: str,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | Rule | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Send the text of the user and yield the answer piece by piece.

        If iteration ends early, the conversation keeps the part of the answer that was generated. Raises ValueError for
        blank text.
        """
        if isinstance(text, str) and not text.strip():
            raise ValueError(f"text={text!r} is blank: give the user's message")
        messages = [*self.messages, {"role": "user", "content": text}]
        new = self._new_tokens(messages)
        # Without a cache (a new conversation, or a lost cache), read all tokens again.
        before = self._tokens if self._cache is None else self._tokens[-1:]
        session = Session(
            self._params,
            np.asarray(before + new, np.int32),
            max_new_tokens=max_new_tokens,
            razor=self._razor if self._cache is None else "auto",
            sampling=sampling,
            seed=seed,
            stop=stop,
            cache=self._cache,
            capacity=self._capacity,
            owns_cache=True,
        )
        return self._run(session, messages, new)

    def _run(self, session: Session, messages: list[dict[str, str]], new: list[int]) -> Iterator[Piece]:
        if messages[:-1] != self.messages:
            raise RuntimeError(
                "the conversation changed after this turn was created (another turn, or reset): ask again"
            )
        # The session now owns the cache, so an early end must take it back. It stays None if the cache is lost,
        # also by a second interruption inside `finally`.
        self._cache = None
        try:
            yield from pieces(session)
        finally:
            if session.state is None:
                source = session.source
                self._cache = None if source is None or kv.deleted(source) else source
            else:
                cache, row = session.cache_after_interruption(), session.rows[0]
                # A failed step has written its token already, maybe with a K/V that is not finite: read all again.
                self._cache = None if row.finish_reason == "error" else cache
                self._tokens += [*new, *row.tokens]
                self.messages = [*messages, {"role": "assistant", "content": row.text}]

    def _new_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the tokens that this turn adds to the conversation."""
        assets = self._params.assets
        if assets is None:
            raise ValueError("these params have no tokenizer and no chat template: chat needs both")
        if not self._tokens:
            return assets.encode(assets.apply_chat(messages), add_special=False)
        self._warn_of_rewrite(assets.encode(assets.apply_chat(messages), add_special=False))
        answer, mark = len(messages) - 2, _ANSWER
        while any(mark in message["content"] for message in messages):
            mark += "!"
        asked = [*messages[:answer], {"role": "assistant", "content": mark}, messages[-1]]
        _, _, after = assets.apply_chat(asked).rpartition(mark)
        new = assets.encode(after, add_special=False)
        # A complete answer ends in the end-of-turn token, which the template would write again.
        return new[1:] if new and new[0] == self._tokens[-1] else new

    def _warn_of_rewrite(self, rendered: list[int]) -> None:
        if not self._warned_of_rewrite and rendered[: len(self._tokens)] != self._tokens:
            self._warned_of_rewrite = True
            log.warning(
                "the chat template rewrites earlier turns, or the text of an answer encodes to other tokens than were "
                "generated: the cache keeps the tokens as they were read"
            )
