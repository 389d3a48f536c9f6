"""Methods by the names that commands take."""

from __future__ import annotations

import dataclasses
from typing import Any

from .adakv import AdaExpectedAttention, AdaKV
from .attention_predictor import AttentionPredictor
from .base import CacheMethod
from .corm import CORM
from .csr import CSR
from .elastic import ElasticCache
from .ems import EMS
from .expected_attention import ExpectedAttention
from .fastgen import FastGen
from .h2o import H2O
from .headkv import HeadKV
from .knorm import KNorm
from .kvzap import KVzap
from .kvzip import KVzip
from .less import LESS
from .pyramidkv import PyramidKV
from .razor_heads import RazorKVzip, RazorSnapKV
from .snapkv import SnapKV
from .streaming import StreamingLLM
from .tova import TOVA

_BOOLEANS = {"true": True, "false": False}
METHODS: dict[str, type[CacheMethod]] = {
    "knorm": KNorm,
    "streaming": StreamingLLM,
    "snapkv": SnapKV,
    "tova": TOVA,
    "h2o": H2O,
    "expected": ExpectedAttention,
    "adakv": AdaKV,
    "adakv-expected": AdaExpectedAttention,
    "pyramidkv": PyramidKV,
    "kvzip": KVzip,
    "headkv": HeadKV,
    "elastic": ElasticCache,
    "corm": CORM,
    "fastgen": FastGen,
    "ems": EMS,
    "razor-kvzip": RazorKVzip,
    "razor-snapkv": RazorSnapKV,
    "kvzap": KVzap,
    "less": LESS,
    "csr": CSR,
    "predictor": AttentionPredictor,
}


def by_name(text: str, budget: float | int) -> CacheMethod:
    """Return a method from its name and fields, such as `snapkv` or `snapkv:window=32,kernel=5`.

    Raises ValueError for an unknown name or field, with the known ones.
    """
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"method {name!r}: use one of {', '.join(METHODS)}")
    method = METHODS[name]
    kinds = {f.name: type(f.default) for f in dataclasses.fields(method) if isinstance(f.default, int | float)}
    kinds.pop("budget")
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        field, _, value = part.partition("=")
        if field not in kinds:
            raise ValueError(f"{name} has no field {field!r}: use {', '.join(kinds) or 'none'}")
        try:
            given[field] = _BOOLEANS[value] if kinds[field] is bool else kinds[field](value)
        except (ValueError, KeyError):
            raise ValueError(f"{name}: {field}={value!r} is no {kinds[field].__name__}") from None
    return method(budget, **given)
