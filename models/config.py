"""The config of a decoder-only transformer: two frozen records that jit can hash."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: the base frequency, and how it is stretched past the trained length.

    `kind` is transformers' `rope_type`: default, linear, llama3, yarn or dynamic. Fields that a kind does not use keep
    their defaults, so that equal embeddings compare equal.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0  # tokens; llama3, yarn and dynamic
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions


@dataclasses.dataclass(frozen=True)
class Experts:
    """Mixture of experts in place of a layer's MLP (`experts.py`)."""

    count: int  # E
    per_token: int  # experts that a token goes through
    intermediate_size: int  # F of each
    normalize: bool = False  # the shares of a token's experts are scaled to the sum 1
    dense_layers: tuple[int, ...] = ()  # layers with an ordinary MLP


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of a Llama- or Qwen-like transformer (letters as in `transformer.py`)."""

    family: str  # the checkpoint's `model_type`
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    max_position_embeddings: int  # tokens the checkpoint was trained for
    rope: Rope = Rope()
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    alibi: bool = False  # attention adds linear biases (`alibi.py`) instead of rotary embedding
    norm_head: bool = False  # rows of the output head are scaled to length 1
    nope_layers: tuple[int, ...] = ()  # layers without rotary embedding
    experts: Experts | None = None

    @property
    def group_size(self) -> int:
        """G, query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    def experts_of(self, layer: int) -> Experts | None:
        """Return the experts of a layer, None if it has an ordinary MLP."""
        return None if self.experts is None or layer in self.experts.dense_layers else self.experts

    def first_like(self, layer: int) -> int:
        """Return the first layer that has the same program as `layer`, so that one compilation serves both."""
        layers = range(self.num_layers)
        return next(each for each in layers if self._program(each) == self._program(layer))

    def _program(self, layer: int) -> tuple[bool, bool]:
        return layer in self.nope_layers, self.experts_of(layer) is None
