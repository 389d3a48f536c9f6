"""Other ways to shrink a KV cache, on the same models and prompts: `generate(params, prompt, razor=SnapKV(0.2))`."""

from .adakv import AdaExpectedAttention, AdaKV
from .attention_predictor import AttentionPredictor
from .base import CacheMethod
from .corm import CORM
from .csr import CSR
from .elastic import ElasticCache
from .ems import EMS
from .expected_attention import ExpectedAttention
from .fastgen import FastGen, token_classes
from .fitting import fit
from .h2o import H2O
from .headkv import HeadKV
from .knorm import KNorm
from .kvzap import KVzap
from .kvzip import KVzip
from .learned import Learned, LearnedMethod, load, stored_path
from .less import LESS
from .pyramidkv import PyramidKV
from .razor_heads import RazorKVzip, RazorSnapKV
from .registry import METHODS, by_name
from .snapkv import SnapKV
from .streaming import StreamingLLM
from .tova import TOVA

__all__ = [
    "CORM",
    "CSR",
    "EMS",
    "H2O",
    "LESS",
    "METHODS",
    "TOVA",
    "AdaExpectedAttention",
    "AdaKV",
    "AttentionPredictor",
    "CacheMethod",
    "ElasticCache",
    "ExpectedAttention",
    "FastGen",
    "HeadKV",
    "KNorm",
    "KVzap",
    "KVzip",
    "Learned",
    "LearnedMethod",
    "PyramidKV",
    "RazorKVzip",
    "RazorSnapKV",
    "SnapKV",
    "StreamingLLM",
    "by_name",
    "fit",
    "load",
    "stored_path",
    "token_classes",
]
