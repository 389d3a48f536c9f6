"""Fields of a request that completions and chat share, and the answers that they ask for."""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Sequence
from typing import Any

from ..text.row_output import check_stops
from ..text.sampling import Sampling
from ..tokenizer.assets import Assets
from .errors import ApiError
from .fields import Fields, short
from .generation import Generation
from .grammar import Grammars
from .prompt import Prompt

SHARED_FIELDS = frozenset(
    {
        "model",
        "stream",
        "stream_options",
        "n",
        "stop",
        "seed",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "max_tokens",
        "logprobs",
        "response_format",
    }
)
MAX_N, MAX_STOPS, MAX_BIASES = 8, 16, 1024
_SEEDS = 2**32
_DECIMAL = re.compile("[0-9]{1,9}")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a request asks for beside its prompt.

    Attributes:
      max_tokens: None if not given.
      stream, include_usage: how the answer is sent.
      n: answers per prompt.
      grammar: source of the grammar of each answer, None for free text.
      Others are as in `Generation`.
    """

    max_tokens: int | None
    stream: bool
    include_usage: bool
    n: int
    sampling: Sampling
    seed: int
    logit_bias: tuple[tuple[int, float], ...]
    stop: tuple[str, ...]
    grammar: str | None


def read_options(fields: Fields, grammars: Grammars, assets: Assets, vocab_size: int, max_model_len: int) -> Options:
    """Return the checked options. Raises ApiError that names the field at fault."""
    given = [name for name in ("max_tokens", "max_completion_tokens") if name in fields]
    limits = {fields.integer(name, None, 0, max_model_len) for name in given}
    if len(limits) > 1:
        message = "max_tokens and max_completion_tokens differ: give one of them"
        raise ApiError(message, param="max_tokens", code="invalid_value")
    stream = fields.boolean("stream")
    include_usage = _include_usage(fields, stream)
    seed = fields.integer("seed", None, -(2**63), 2**63 - 1)
    return Options(
        max_tokens=limits.pop() if limits else None,
        stream=stream,
        include_usage=include_usage,
        n=fields.integer("n", 1, 1, MAX_N),
        sampling=_sampling(fields),
        seed=secrets.randbelow(_SEEDS) if seed is None else seed % _SEEDS,
        logit_bias=_logit_bias(fields, vocab_size),
        stop=_stop(fields, assets),
        grammar=_response_grammar(fields, grammars),
    )


def make_generations(
    id: str, prompts: Sequence[Prompt], options: Options, grammars: Grammars, max_tokens: int, **common: Any
) -> list[Generation]:
    """Return one generation per answer: n per prompt, with seeds that follow each other.

    `common` are fields of `Generation` that all share.
    """
    return [
        Generation(
            id=f"{id}-{index}",
            prompt=prompt.tokens,
            max_tokens=max_tokens,
            sampling=options.sampling,
            seed=(options.seed + index % options.n) % _SEEDS,
            logit_bias=options.logit_bias,
            stop=options.stop,
            checkpoints=prompt.checkpoints,
            grammar=None if options.grammar is None else grammars.start(options.grammar),
            **common,
        )
        for index, prompt in enumerate(prompt for prompt in prompts for _ in range(options.n))
    ]


def check_fits(prompts: Sequence[Prompt], max_tokens: int, max_model_len: int) -> None:
    """Raise ApiError if a prompt and its answer have more tokens than the server takes."""
    longest = max(len(prompt.tokens) for prompt in prompts)
    if longest + max_tokens > max_model_len:
        raise ApiError(
            f"a prompt of {longest:,} tokens and max_tokens={max_tokens:,} need {longest + max_tokens:,} tokens, but "
            f"prompt and answer may have {max_model_len:,}: shorten the prompt or lower max_tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = Fields(fields.mapping("stream_options"), ("include_usage", "include_obfuscation"))
    if "stream_options" in fields and not stream:
        raise ApiError("stream_options without stream: true", param="stream_options", code="invalid_value")
    return options.boolean("include_usage")


def _sampling(fields: Fields) -> Sampling:
    temperature = fields.number("temperature", 1.0, 0, 2)
    if 0 < temperature < 1e-6:
        message = f"temperature={temperature:g}: must be 0 (greedy) or from 1e-6 to 2"
        raise ApiError(message, param="temperature", code="invalid_value")
    filters = {
        "top_p": _above_zero(fields, "top_p", 1),
        "top_k": fields.integer("top_k", None, 1, 2**31 - 1),
        "min_p": fields.number("min_p", None, 0, 1),
    }
    return Sampling.of(
        temperature=temperature,
        **(filters if temperature else {}),  # Clients send their defaults beside temperature 0.
        repetition_penalty=_above_zero(fields, "repetition_penalty", 10) or 1.0,
        **{
            name: fields.number(name, 0.0, -2, 2)
            for name in ("presence_penalty", "frequency_penalty")
            if fields.number(name, 0.0, -2, 2)
        },
    )


def _above_zero(fields: Fields, name: str, high: float) -> float | None:
    value = fields.number(name, None, 0, high)
    if value == 0:
        raise ApiError(f"{name}=0: must be above 0, at most {high:g}", param=name, code="invalid_value")
    return value


def _logit_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases = fields.mapping("logit_bias")
    if len(biases) > MAX_BIASES:
        message = f"logit_bias has {len(biases):,} tokens: give at most {MAX_BIASES:,}"
        raise ApiError(message, param="logit_bias", code="invalid_value")
    for token, bias in biases.items():
        known = _DECIMAL.fullmatch(token) and int(token) < vocab_size
        if not known or type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ApiError(
                f"logit_bias has {short(token)}: {short(bias)}: must map token ids 0..{vocab_size - 1} to numbers from "
                "-100 to 100",
                param="logit_bias",
                code="invalid_value",
            )
    return tuple((int(token), float(bias)) for token, bias in biases.items())


def _stop(fields: Fields, assets: Assets) -> tuple[str, ...]:
    stop = fields.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        message = f"stop={short(stop)}: must be a non-empty string, or a list of at most {MAX_STOPS} of them"
        raise ApiError(message, param="stop", code="invalid_value")
    try:
        check_stops(assets, stops)
    except ValueError as error:
        raise ApiError(str(error), param="stop", code="invalid_value") from error
    return tuple(stops)


def _response_grammar(fields: Fields, grammars: Grammars) -> str | None:
    form = fields.mapping("response_format")
    match form.get("type", "text"):
        case "text":
            return None
        case "json_object":
            return grammars.json_object()
        case "json_schema":
            described = form.get("json_schema")
            schema = described.get("schema") if isinstance(described, dict) else None
            if isinstance(schema, dict):
                return grammars.json_schema(schema, "response_format")
    allowed = '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {…}}}'
    message = f"response_format={short(form)}: must be {allowed}"
    raise ApiError(message, param="response_format", code="invalid_value")
