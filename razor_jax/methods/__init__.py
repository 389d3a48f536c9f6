"""Other ways to shrink a KV cache, on the same models and prompts: `generate(params, prompt, razor=SnapKV(0.2))`."""

from .base import CacheMethod
from .expected_attention import ExpectedAttention
from .h2o import H2O
from .knorm import KNorm
from .registry import METHODS, by_name
from .snapkv import SnapKV
from .streaming import StreamingLLM
from .tova import TOVA

__all__ = [
    "H2O",
    "METHODS",
    "TOVA",
    "CacheMethod",
    "ExpectedAttention",
    "KNorm",
    "SnapKV",
    "StreamingLLM",
    "by_name",
]
