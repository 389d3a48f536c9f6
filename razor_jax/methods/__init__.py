"""Other ways to shrink a KV cache, on the same models and prompts: `generate(params, prompt, razor=SnapKV(0.2))`."""

from .adakv import AdaExpectedAttention, AdaKV
from .base import CacheMethod
from .corm import CORM
from .elastic import ElasticCache
from .ems import EMS
from .expected_attention import ExpectedAttention
from .fastgen import FastGen, token_classes
from .h2o import H2O
from .headkv import HeadKV
from .knorm import KNorm
from .kvzip import KVzip
from .pyramidkv import PyramidKV
from .razor_heads import RazorKVzip, RazorSnapKV
from .registry import METHODS, by_name
from .snapkv import SnapKV
from .streaming import StreamingLLM
from .tova import TOVA

__all__ = [
    "CORM",
    "EMS",
    "H2O",
    "METHODS",
    "TOVA",
    "AdaExpectedAttention",
    "AdaKV",
    "CacheMethod",
    "ElasticCache",
    "ExpectedAttention",
    "FastGen",
    "HeadKV",
    "KNorm",
    "KVzip",
    "PyramidKV",
    "RazorKVzip",
    "RazorSnapKV",
    "SnapKV",
    "StreamingLLM",
    "by_name",
    "token_classes",
]
