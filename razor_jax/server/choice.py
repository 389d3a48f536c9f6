"""One answer of a response while it grows: pieces for a stream, and the whole answer for a response without one.

Both come from the same pieces, so a streamed answer equals the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from ..text.logprobs import TokenLogprob
from ..tokenizer.assets import Assets
from .generation import Delta, Finished
from .tokenize import token_text

_LEAST = -9999.0  # Log probability of a token that cannot come; JSON has no infinity.


@runtime_checkable
class Choice(Protocol):
    """An answer of a response."""

    def begin(self) -> dict[str, Any] | None:
        """Return the first piece for a stream, None if there is none before a token."""
        ...

    def grow(self, delta: Delta) -> dict[str, Any] | None:
        """Return the piece of a delta, None if nothing became visible."""
        ...

    def end(self, finished: Finished) -> list[dict[str, Any]]:
        """Return the last pieces; only the last has a finish reason."""
        ...

    def whole(self) -> dict[str, Any]:
        """Return the answer, after its end."""
        ...


def usage(prompts: int, n: int, ends: Sequence[Finished], hidden: int = 0) -> dict[str, Any]:
    """Return the token counts of a response: `prompts` prompts with n answers each.

    A prompt counts once whatever n. `hidden`: tokens per answer that the client did not ask for.
    """
    firsts = [ends[index * n] for index in range(prompts)]
    prompt_tokens = sum(end.prompt_tokens for end in firsts)
    completion_tokens = sum(end.completion_tokens - hidden for end in ends)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in firsts)},
    }


def finite(logprob: float) -> float:
    """Return a log probability that JSON can hold."""
    return max(float(logprob), _LEAST) if not math.isnan(logprob) else _LEAST


def chat_logprob(assets: Assets, each: TokenLogprob) -> dict[str, Any]:
    """Return the log probability of a token in the form of chat responses."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, data = token_text(assets, token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(data)}

    return {**entry(each.token, each.logprob), "top_logprobs": [entry(*top) for top in each.top]}


def completion_token(assets: Assets, token: int) -> str:
    """Return the text of a token in the form of completion responses; bytes of a part of a character are written."""
    text, data = token_text(assets, token)
    return text if data == text.encode() else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
