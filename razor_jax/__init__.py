"""RazorAttention (arXiv 2407.15891) in JAX: long-context inference with a really compressed KV cache."""

from .cache import KVCache
from .cache_store import load_cache, save_cache
from .chat import Chat
from .config import HeadSplit, RazorConfig
from .functional import decode, extend, init_cache
from .generate import Piece, generate, prefill, stream
from .heads import HeadScores, find_heads
from .hub import load, save
from .params import Params, with_heads
from .report import KVReport, Result
from .sampling import Greedy, MinP, Sampling, Temperature, TopK, TopP
from .scoring import Score, score
from .tokenizer import Assets

__version__ = "0.1.0"

__all__ = [
    "Assets",
    "Chat",
    "Greedy",
    "HeadScores",
    "HeadSplit",
    "KVCache",
    "KVReport",
    "MinP",
    "Params",
    "Piece",
    "RazorConfig",
    "Result",
    "Sampling",
    "Score",
    "Temperature",
    "TopK",
    "TopP",
    "__version__",
    "decode",
    "extend",
    "find_heads",
    "generate",
    "init_cache",
    "load",
    "load_cache",
    "prefill",
    "save",
    "save_cache",
    "score",
    "stream",
    "with_heads",
]
