"""Types of the fields of config.json, checked before any of them is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """Values that a field may have: their description for errors, and the test."""

    allowed: str
    holds: Callable[[Any], bool]


def optional(kind: Kind) -> Kind:
    """Return the kind that also allows null."""
    return Kind(f"{kind.allowed}, or null", lambda value: value is None or kind.holds(value))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


COUNT = Kind("a positive whole number", lambda value: _is_int(value) and value > 0)
WHOLE = Kind("a whole number of at least 0", lambda value: _is_int(value) and value >= 0)
POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
NUMBER = Kind("a number of at least 0", lambda value: _is_number(value) and value >= 0)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
TEXTS = Kind(
    "a list of strings", lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value)
)
WHOLES = Kind(
    "a list of whole numbers of at least 0",
    lambda value: isinstance(value, list) and all(WHOLE.holds(each) for each in value),
)
FLAGS = Kind("a list of 0 and 1", lambda value: isinstance(value, list) and all(each in (0, 1) for each in value))
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))

# What transformers 5 accepts. Null means the default only where it does so there.
FIELDS = {
    "architectures": optional(TEXTS),
    "vocab_size": COUNT,
    "hidden_size": COUNT,
    "intermediate_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "num_key_value_heads": optional(COUNT),
    "head_dim": optional(COUNT),
    "max_position_embeddings": COUNT,
    "original_max_position_embeddings": optional(COUNT),
    "rms_norm_eps": NUMBER,
    "hidden_act": TEXT,
    "tie_word_embeddings": SWITCH,
    "attention_bias": optional(SWITCH),
    "mlp_bias": optional(SWITCH),
    "layer_types": optional(TEXTS),
    "sliding_window": optional(WHOLE),
    "use_sliding_window": optional(SWITCH),
    "max_window_layers": optional(WHOLE),
    "rope_theta": optional(POSITIVE),
    "partial_rotary_factor": optional(POSITIVE),
    "rope_scaling": optional(OBJECT),
    "rope_parameters": optional(OBJECT),
    "dtype": optional(TEXT),
    "torch_dtype": optional(TEXT),
    "quantization": optional(OBJECT),
    "quantization_config": optional(OBJECT),
    "no_rope_layers": optional(FLAGS),
    "no_rope_layer_interval": COUNT,
    "moe_intermediate_size": COUNT,
    "num_experts_per_tok": COUNT,
    "norm_topk_prob": SWITCH,
    "decoder_sparse_step": COUNT,
    "mlp_only_layers": optional(WHOLES),
    "num_experts": optional(WHOLE),
    "num_local_experts": optional(WHOLE),
    "n_routed_experts": optional(WHOLE),
    "moe_num_experts": optional(WHOLE),
}
ROPE_FIELDS = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": optional(POSITIVE),
    "partial_rotary_factor": optional(POSITIVE),
    "factor": optional(POSITIVE),
    "original_max_position_embeddings": optional(COUNT),
    "low_freq_factor": optional(POSITIVE),
    "high_freq_factor": optional(POSITIVE),
    "beta_fast": optional(NUMBER),
    "beta_slow": optional(NUMBER),
    "attention_factor": optional(POSITIVE),
    "mscale": optional(NUMBER),
    "mscale_all_dim": optional(NUMBER),
    "truncate": optional(SWITCH),
}


def check(hf: Mapping[str, Any], kinds: Mapping[str, Kind] = FIELDS) -> None:
    """Raise one ValueError that names all fields of the wrong type, each with its value and what is allowed.

    Absent fields pass. The fields of `rope_scaling` or `rope_parameters` are checked with `FIELDS`.
    """
    problems = _problems(hf, kinds)
    for name in ("rope_scaling", "rope_parameters"):
        if name in kinds and isinstance(hf.get(name), Mapping):
            problems += [f"{name}.{problem}" for problem in _problems(hf[name], ROPE_FIELDS)]
    if problems:
        raise ValueError("; ".join(problems))


def _problems(fields: Mapping[str, Any], kinds: Mapping[str, Kind]) -> list[str]:
    return [
        f"{name}={'null' if fields[name] is None else repr(fields[name])} in config.json: must be {kind.allowed}"
        for name, kind in kinds.items()
        if name in fields and not kind.holds(fields[name])
    ]
