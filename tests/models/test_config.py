"""config.json of the supported families: old and new spellings, defaults, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import transformers

from razor_jax.models import read_config, write_config

PUBLISHED = {
    "llama 2": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "pretraining_tp": 1,
        "torch_dtype": "float16",
    },
    "llama 3.2": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": True,
    },
    "mistral nemo": {
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "qwen 2.5 stretched": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 131072,
        "max_window_layers": 28,
        "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "qwen 2 window in no layer": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 28,
        "num_attention_heads": 32,
        "use_sliding_window": True,
        "max_window_layers": 28,
    },
    "qwen 3": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "rope_theta": 1000000,
    },
}


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_config_defaults_are_those_of_transformers(published):
    ours = read_config(published)
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(published)))
    head_dim = getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert (ours.num_heads, ours.num_kv_heads, ours.head_dim) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        head_dim,
    )
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    rope = theirs.rope_parameters
    assert (ours.rope.kind, ours.rope.theta) == (rope["rope_type"], rope["rope_theta"])
    assert ours.rope.factor == rope.get("factor", 1.0)
    assert ours.rope.original_max_position == rope.get("original_max_position_embeddings", 0)


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_a_written_config_reads_back(published):
    config = read_config(published)
    assert read_config(write_config(config)) == config


def _llama(**fields):
    return {**PUBLISHED["llama 3.2"], **fields}


def _qwen(**fields):
    return {**PUBLISHED["qwen 2 window in no layer"], **fields}


REFUSED = {
    "another architecture": (
        {"model_type": "mixtral"},
        r"model_type='mixtral'.*llama.*mistral.*qwen2.*qwen3_moe.*smollm3",
    ),
    "none": ({}, r"model_type=None"),
    "no language model": (
        _llama(architectures=["LlamaForSequenceClassification"]),
        r"SequenceClassification.*CausalLM",
    ),
    "no sizes": (
        {"model_type": "llama", "vocab_size": 9},
        r"lacks hidden_size, intermediate_size, num_hidden_layers",
    ),
    "a word for a size": (_llama(hidden_size="large"), r"hidden_size='large'.*whole number"),
    "no whole groups": (_llama(num_key_value_heads=5), r"num_attention_heads=32.*num_key_value_heads=5"),
    "an odd head": (_llama(head_dim=63), r"head_dim=63 must be even"),
    "experts of another family": (
        _llama(num_local_experts=8),
        r"num_local_experts=8.*qwen3_moe only, not for llama.*dense",
    ),
    "another type for a type": (_llama(model_type=["llama"]), r"model_type=\['llama'\].*llama"),
    "a factor of nothing": (
        _llama(rope_scaling={"rope_type": "linear", "factor": 0}),
        r"rope_scaling\.factor=0 in config\.json: must be a number above 0",
    ),
    "bands the wrong way round": (
        _llama(rope_scaling={**PUBLISHED["llama 3.2"]["rope_scaling"], "high_freq_factor": 1.0}),
        r"high_freq_factor=1\.0.*above low_freq_factor=1\.0",
    ),
    "another activation": (_llama(hidden_act="gelu"), r"hidden_act='gelu'.*silu"),
    "longrope": (
        _llama(rope_scaling={"type": "longrope"}),
        r"'longrope'.*default, linear, llama3, yarn, dynamic",
    ),
    "part of a head": (_llama(partial_rotary_factor=0.5), r"partial_rotary_factor=0.5"),
    "no factor": (
        _llama(rope_scaling={"rope_type": "linear"}),
        r"factor=None in config.json: rope type 'linear' needs a number",
    ),
    "mistral's window": (
        {**PUBLISHED["mistral nemo"], "sliding_window": 4096},
        r"sliding_window=4096.*131072",
    ),
    "qwen's window": (_qwen(max_window_layers=20), r"sliding_window=4096.*32768"),
    "qwen's window, new": (
        _qwen(layer_types=["full_attention"] * 27 + ["sliding_attention"]),
        r"sliding_window=4096",
    ),
    "other layers": (_qwen(layer_types=["linear_attention"] * 28), r"linear_attention.*full_attention"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_supported_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        read_config(given)


# Each field with a value of a wrong type; null is among them where transformers refuses it.
MISTYPED = [
    *(
        (field, value)
        for field in ("vocab_size", "num_hidden_layers", "max_position_embeddings")
        for value in (None, 0)
    ),
    *((field, value) for field in ("hidden_size", "num_attention_heads") for value in (True, 64.0, "64", [64])),
    *((field, value) for field in ("num_key_value_heads", "head_dim") for value in (0, "8", False)),
    ("intermediate_size", 2**70),
    *(("rms_norm_eps", value) for value in (None, "1e-5", -1.0, float("nan"), [1e-5])),
    *(("rope_theta", value) for value in (0, -1.0, "10000", float("inf"), True)),
    *(("tie_word_embeddings", value) for value in (None, "false", 0)),
    *((field, value) for field in ("attention_bias", "mlp_bias", "use_sliding_window") for value in ("no", 1)),
    *(("hidden_act", value) for value in (None, ["silu"])),
    *((field, value) for field in ("architectures", "layer_types") for value in ("LlamaForCausalLM", [1])),
    *((field, value) for field in ("rope_scaling", "rope_parameters") for value in ("linear", [], 4)),
    *((field, value) for field in ("torch_dtype", "dtype") for value in (16, ["bfloat16"])),
    *((field, "8") for field in ("num_experts", "num_local_experts", "sliding_window", "max_window_layers")),
    *((field, "awq") for field in ("quantization_config", "quantization")),
    ("partial_rotary_factor", "half"),
    ("original_max_position_embeddings", "8192"),
]
MISTYPED_ROPE = [
    *(("factor", value) for value in (0, 0.0, -2.0, "4", True, float("nan"))),
    *((field, value) for field in ("low_freq_factor", "high_freq_factor", "attention_factor") for value in (0, "1")),
    *((field, value) for field in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim") for value in (-1, "32")),
    *(("original_max_position_embeddings", value) for value in (0, 8192.5, "8192")),
    *(("rope_type", value) for value in (None, 3, ["yarn"])),
    ("rope_theta", 0),
    ("truncate", "yes"),
]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(("field", "value"), MISTYPED, ids=str)
def test_mistyped_fields_are_named(family, field, value):
    shown = "null" if value is None else repr(value)
    with pytest.raises(ValueError, match=re.escape(f"{field}={shown} in config.json: must be ") + r"\w"):
        read_config(_llama(model_type=family, **{field: value}))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
@pytest.mark.parametrize(("field", "value"), MISTYPED_ROPE, ids=str)
def test_mistyped_rope_fields_are_named(kind, field, value):
    rope = {**PUBLISHED["llama 3.2"]["rope_scaling"], "rope_type": kind, field: value}
    shown = "null" if value is None else repr(value)
    with pytest.raises(ValueError, match=re.escape(f"rope_scaling.{field}={shown} in config.json: must be ") + r"\w"):
        read_config(_llama(rope_scaling=rope))


def test_all_mistyped_fields_come_in_one_error():
    wrong = {"hidden_size": None, "rms_norm_eps": "small", "rope_scaling": {"rope_type": "linear", "factor": -1}}
    with pytest.raises(ValueError, match=r"hidden_size=null .*; rms_norm_eps='small' .*; rope_scaling\.factor=-1"):
        read_config(_llama(**wrong))


NULLS = ("num_key_value_heads", "head_dim", "rope_scaling", "layer_types", "sliding_window")
NULLS += ("architectures", "torch_dtype", "quantization_config")


@pytest.mark.parametrize("field", NULLS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_nulls_that_transformers_takes_are_defaults(family, field):
    given = _llama(model_type=family, **{field: None})
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(given)))
    ours = read_config(given)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, head_dim)
    rope = theirs.rope_parameters
    assert (ours.rope.kind, ours.rope.theta) == (rope["rope_type"], rope["rope_theta"])


@pytest.mark.parametrize("architecture", ["LlamaModel", "LlamaForCausalLM"])
def test_a_base_model_is_a_language_model(architecture):
    assert read_config(_llama(architectures=[architecture])) == read_config(_llama())


def test_a_window_as_long_as_the_context_is_no_window():
    assert read_config({**PUBLISHED["mistral nemo"], "sliding_window": 131072}).family == "mistral"


def test_a_config_without_a_hugging_face_spelling_is_not_written():
    config = read_config(PUBLISHED["llama 2"])
    with pytest.raises(ValueError, match=r"cannot express.*orbax"):
        write_config(dataclasses.replace(config, qk_norm=True))
    with pytest.raises(ValueError, match="family='mine'"):
        write_config(dataclasses.replace(config, family="mine"))
