"""RazorAttention (arXiv 2407.15891) in JAX: long-context inference with a really compressed KV cache.

Start with

    params = razor_jax.load("razor-mini")  # or a folder, a GGUF file, a Hub id
    result = razor_jax.generate(params, "Hello!")
    print(result.text, result.kv)

`prefill` reads a document once and `generate(…, cache=cache)` asks about it; `Chat` holds a conversation; `find_heads`
chooses the KV heads that keep everything; `init_cache`, `extend` and `decode` are for loops of your own.
"""

from .cache import KVCache
from .checkpoint.cache import load_cache, save_cache
from .checkpoint.hub import load, save
from .config import HeadSplit, RazorConfig
from .functional import decode, extend, init_cache
from .heads import HeadScores, find_heads
from .params import Params, with_heads
from .text.chat import Chat
from .text.generate import generate, prefill, stream
from .text.logprobs import TokenLogprob
from .text.result import KVReport, Result
from .text.sampling import Greedy, MinP, Sampling, Temperature, TopK, TopP
from .text.scoring import Score, score
from .text.session import Piece
from .tokenizer.assets import Assets

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
    "TokenLogprob",
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


def __dir__() -> list[str]:
    return __all__
