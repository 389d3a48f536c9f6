"""Requests of lm-evaluation-harness as `harness` handles them: tokens, and options of an answer."""

from __future__ import annotations

import dataclasses
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from ..config import check_int
from ..params import Params
from ..text.sampling import Sampling

Tokens = list[int]
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# Further arguments of the harness's `hf` model, each with the value that turns it off and is the only one taken.
_OFF = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "penalty_alpha": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "use_cache": True,
}
_OFF_IN_SAMPLING = {"typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
_NO_EFFECT = ("length_penalty", "early_stopping", "pad_token_id")  # For beams, and for padding that no row reads.


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
    def of(
        cls, given: dict[str, Any], params: Params, eos: int, max_length: int, max_gen_toks: int, whole: bool = False
    ) -> RequestOptions:
        """Return the options in a task's generation_kwargs. `whole`: contexts are read in one piece.

        Raises ValueError for names that are unknown or not supported, or an answer that leaves no room for a context.
        """
        assets = params.assets
        assert assets is not None
        given = {name: value for name, value in given.items() if value is not None}
        options: dict[str, Any] = dict(normalize_gen_kwargs(given, max_gen_toks))
        new_tokens = check_int("max_gen_toks", options.pop("max_gen_toks"), 1, max_length - 1)
        until = handle_stop_sequences(options.pop("until"), eos=assets.decode([eos], skip_special=False))
        draws = options.pop("do_sample")
        _take_off(options, _OFF | (_OFF_IN_SAMPLING if draws else dict.fromkeys(_OFF_IN_SAMPLING)))
        penalty = _repetition_penalty(options.pop("repetition_penalty", 1.0), whole)
        unknown = sorted(set(options) - set(SAMPLING))
        if unknown:
            raise ValueError(
                f"generation_kwargs: {', '.join(unknown)} is unknown; allowed are until, max_gen_toks, do_sample, "
                + ", ".join((*SAMPLING, "repetition_penalty"))
            )
        if options.get("top_k") == 0:  # How the `hf` model spells no filter.
            del options["top_k"]
        if not draws or options.get("temperature") == 0:  # the harness passes draws' numbers for greedy answers too
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
            sampling=Sampling.of(**options, repetition_penalty=penalty),
        )


def check_batch_size(value: int | str) -> int:
    """Return the number of requests per batch, which the harness's command line gives as text.

    Raises ValueError for other values, "auto" among them.
    """
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, str):
        raise ValueError(
            f"batch_size={value!r}: must be a whole number of at least 1; the largest batch is not searched for, so "
            "start with 8 and double it as long as it fits into the memory"
        )
    return check_int("batch_size", value, 1)


def _take_off(options: dict[str, Any], off: dict[str, Any]) -> None:
    """Remove arguments that have no effect here; raise ValueError for one that is on. Off as None: any value."""
    for name in _NO_EFFECT:
        options.pop(name, None)
    for name, value in off.items():
        if name in options and (found := options.pop(name)) != value and value is not None:
            raise ValueError(f"generation_kwargs: {name}={found!r} is not supported: leave it out, or use {value!r}")


def _repetition_penalty(penalty: float, whole: bool) -> float:
    if penalty != 1 and not whole:
        raise ValueError(
            f"generation_kwargs: repetition_penalty={penalty!r} does not see what is in the cache before the answer "
            "begins: pass question_tokens=0 in model_args, which reads contexts whole"
        )
    return penalty
