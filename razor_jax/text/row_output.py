"""Output of one sequence on the host: its tokens, its text as it grows, and why it ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..tokenizer.assets import Assets, Detokenizer, find_stop
from .result import FinishReason


def end_ids(assets: Assets | None, stops: Sequence[str]) -> tuple[int, ...]:
    """Return the ids that end a row: the end tokens of the checkpoint, and stop strings that are special tokens.

    Text never shows a special token, so only its id can be matched.
    """
    if assets is None:
        return ()
    return (*assets.eos_ids, *(token for stop in stops for token, text in _special_in(assets, stop) if text == stop))


def check_stops(assets: Assets | None, stops: Sequence[str]) -> None:
    """Raise ValueError for a stop string that can never match: one of a special token and other text."""
    if assets is None:
        return
    for stop in stops:
        for token, text in _special_in(assets, stop):
            if text != stop and token not in assets.eos_ids:
                raise ValueError(f"stop={stop!r} never matches, because text shows no special token: give {text!r}")


def _special_in(assets: Assets, stop: str) -> list[tuple[int, str]]:
    """Return the special tokens of a stop string, ids and texts."""
    ids = assets.encode(stop, add_special=False)
    return [(i, text) for i in ids if not assets.decode([i]) and (text := assets.decode([i], skip_special=False))]


class RowOutput:
    """Tokens and text of one row.

    Text is safe to show once no later token can change it: incomplete characters and an end that may grow into a stop
    string are delayed. The safe text does not depend on how the tokens were cut into calls.

    Attributes:
      tokens: token ids up to the one that ended the row, including it.
      text: text of the tokens, cut at a stop string. A token that ends the row adds no text.
      safe: length of the text that is safe to show; all of it once the row has finished.
      stopped_at: number of tokens up to the one that completed a stop string, None without one.
      finished: whether the row reached an end token, a stop string or its limit, or failed.
      finish_reason: of a finished row.
    """

    def __init__(self, assets: Assets | None, stops: Sequence[str], limit: int):
        """Start a row of at most `limit` tokens. Without a tokenizer, `text` stays empty."""
        self._stops, self._limit = stops, limit
        self._ends = frozenset(end_ids(assets, stops))
        self._detokenizer = Detokenizer(assets) if assets is not None and assets.tokenizer_json is not None else None
        self._shown = 0
        self.tokens: list[int] = []
        self.text = ""
        self.safe = 0
        self.stopped_at: int | None = None
        self.finished = False
        self.finish_reason: FinishReason = "length"

    def push(self, tokens: Iterable[int]) -> None:
        """Append tokens. Those after the end of the row are ignored."""
        for token in tokens:
            if self.finished:
                return
            self.tokens.append(token)
            ended = token in self._ends
            self.finished = ended or len(self.tokens) >= self._limit
            if self._detokenizer is not None:
                self._add(
                    ("" if ended else self._detokenizer.push([token]))
                    + (self._detokenizer.flush() if self.finished else "")
                )
            if ended or self.stopped_at is not None:
                self.finish_reason = "stop"

    def fail(self) -> None:
        """End the row with reason "error", unless it has finished: its next token could not be computed."""
        if self.finished:
            return
        self.finished, self.finish_reason = True, "error"
        if self._detokenizer is not None:
            self._add(self._detokenizer.flush())

    def _add(self, text: str) -> None:
        self.text += text
        at, self.safe = find_stop(self.text, self._stops, self.safe)
        if at is not None:
            self.text, self.stopped_at, self.finished = self.text[:at], len(self.tokens), True
        elif self.finished:
            self.safe = len(self.text)

    def take(self) -> str:
        """Return the text that became safe since the last call.

        The returned pieces of a finished row together are its `text`.
        """
        text, self._shown = self.text[self._shown : self.safe], self.safe
        return text
