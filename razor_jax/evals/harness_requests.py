"""Requests of lm-evaluation-harness as `harness` handles them: tokens, and options of an answer."""

from __future__ import annotations

import dataclasses
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from ..config import check_int
from ..params import Params
from ..text.sampling import Sampling

Tokens = list[int]
SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # A penalty would not see cached tokens.


@dataclasses.dataclass(frozen=True)
class RequestTokens:
    """Token ids of a request: `read` in prefill, `held` back for after it, and the `scored` continuation."""

    read: Tokens
    held: Tokens
    scored: Tokens

    @property
    def context(self) -> Tokens:
        return self.read + self.held

    @property
    def fed(self) -> Tokens:
        return self.held + self.scored

    @classmethod
    def of(cls, context: Tokens, held: int, scored: Tokens | None = None) -> RequestTokens:
        """Split a context: hold its last `held` tokens back, but always prefill the first."""
        at = max(1, len(context) - held)
        return cls(context[:at], context[at:], scored or [])


@dataclasses.dataclass(frozen=True)
class RequestOptions:
    """Options of a request's answer.

    Attributes:
      params: the model's, with stop strings that are special tokens added to the stop ids.
      until: all stop strings.
      strings: the stop strings that are ordinary text.
      new_tokens: most tokens of the answer.
      room: most tokens of the context.
    """

    params: Params
    until: list[str]
    strings: list[str]
    new_tokens: int
    room: int
    sampling: Sampling

    @classmethod
    def of(cls, given: dict[str, Any], params: Params, eos: int, max_length: int, max_gen_toks: int) -> RequestOptions:
        """Make the options from a task's generation_kwargs.

        Raises ValueError for unknown names, or an answer that leaves no room for a context.
        """
        assets = params.assets
        assert assets is not None
        options: dict[str, Any] = dict(normalize_gen_kwargs(given, max_gen_toks))
        new_tokens = check_int("max_gen_toks", options.pop("max_gen_toks"), 1, max_length - 1)
        until = handle_stop_sequences(options.pop("until"), eos=assets.decode([eos], skip_special=False))
        draws = options.pop("do_sample")
        unknown = sorted(set(options) - set(SAMPLING))
        if unknown:
            raise ValueError(
                f"generation_kwargs: {', '.join(unknown)} is unknown; allowed are until, max_gen_toks, do_sample, "
                + ", ".join(SAMPLING)
            )
        if not draws:  # the harness passes a temperature even for greedy answers
            options = {"temperature": 0.0}
        # Special tokens do not appear in the text, so one that is a stop string ends the answer by its id.
        single = {stop: assets.encode(stop, add_special=False) for stop in until if stop}
        special = {stop: ids[0] for stop, ids in single.items() if len(ids) == 1 and not assets.decode(ids)}
        ends = dict.fromkeys((*assets.eos_ids, *special.values()))
        return cls(
            params=params.replace(assets=dataclasses.replace(assets, eos_ids=tuple(ends))),
            until=until,
            strings=[stop for stop in single if stop not in special],
            new_tokens=new_tokens,
            room=max_length - new_tokens,
            sampling=Sampling.of(**options),
        )
