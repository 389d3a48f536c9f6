"""A conversation that keeps its cache: each turn reads only what is new."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from .. import cache as kv
from ..cache import KVCache
from ..params import Params
from .policy import Policy
from .result import Result
from .sampling import Rule, Sampling
from .session import Piece, Session, pieces

log = logging.getLogger("razor_jax")

# Placeholder for an answer while the template is rendered.
_ANSWER = "razor-jax-answer"


class Chat:
    """A conversation by the checkpoint's chat template.

    A turn extends the cache by what the template writes after the last answer: the answer itself is
    already in the cache, as the tokens that were generated. Where a template rewrites earlier turns (drops
    reasoning, say) the cache keeps them as they were read, and a warning says so once.

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
        self._params, self._capacity = params, capacity
        self._razor: Policy = razor
        self._system = system
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[dict[str, str]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self._cache: KVCache | None = None
        # All tokens read or generated; the last is not in the cache yet.
        self._tokens: list[int] = []
        self._told_rewrite = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens of the conversation as the model has read them."""
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
        """Return one turn: the user's text in, the answer's `Result` out. Errors leave the conversation as it was."""
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
        """Run `send`, piece by piece. Leaving the loop early keeps the part of the answer that was generated."""
        messages = [*self.messages, {"role": "user", "content": text}]
        new = self._new_tokens(messages)
        # A conversation that lost its cache is read again.
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
            raise RuntimeError("the conversation went on, or was reset, after this turn was asked for: ask again")
        # The session writes into the cache from here on, so an early end has to keep what it did. A cache lost
        # on the way, or by a second interruption in here, is None.
        self._cache = None
        try:
            yield from pieces(session)
        finally:
            if session.state is None:
                source = session.source
                self._cache = None if source is None or kv.deleted(source) else source
            else:
                cache, row = session.settled_cache(), session.rows[0]
                self._cache = cache
                self._tokens += [*new, *row.tokens]
                self.messages = [*messages, {"role": "assistant", "content": row.text}]

    def _new_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the tokens that this turn adds."""
        assets = self._params.assets
        if assets is None:
            raise ValueError("these params carry no tokenizer and no chat template: chat needs both")
        if not self._tokens:
            return assets.encode(assets.apply_chat(messages), add_special=False)
        self._notice_rewrite(assets.encode(assets.apply_chat(messages), add_special=False))
        answer, mark = len(messages) - 2, _ANSWER
        while any(mark in message["content"] for message in messages):
            mark += "!"
        asked = [*messages[:answer], {"role": "assistant", "content": mark}, messages[-1]]
        _, _, after = assets.apply_chat(asked).rpartition(mark)
        new = assets.encode(after, add_special=False)
        # An answer that ended by itself has already brought the template's end-of-turn token.
        return new[1:] if new and new[0] == self._tokens[-1] else new

    def _notice_rewrite(self, rendered: list[int]) -> None:
        if not self._told_rewrite and rendered[: len(self._tokens)] != self._tokens:
            self._told_rewrite = True
            log.warning(
                "the chat template writes earlier turns otherwise than they were read (or the answer's text "
                "encodes to other tokens): the cache keeps what was read"
            )
