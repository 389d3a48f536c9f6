"""One decoder-only transformer for every family; attention is an argument.

B batch, T tokens of this call, D model width, L layers, N query heads, K KV heads, G = N/K query
heads per KV head, H head width, F feed-forward width, V vocabulary. Query rows of a KV head are
packed t-major: row t·G + g. Rotary embedding is the model's, ALiBi's biases are attention's.
Kernels may be int8 or int4 (`linear.py`).

The model knows nothing of caches: the caller passes `attend(q, k, v, state) -> (out, state)` and one opaque
state per layer. `Block` also offers its parts (`keys_values`, `queries`, `output_and_mlp`), so that a long
prompt can pass through a layer in chunks of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from . import experts
from .config import Experts, ModelConfig
from .experts import ExpertLinear
from .linear import Linear, attend, look_up
from .rope import Tables, rotate

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
Mix = Callable[[jax.Array, jax.Array, Any], jax.Array]  # `experts.mix` for rows [B, T, D]

_INIT = nn.initializers.normal(0.02)


class Block(nn.Module):
    """Pre-norm attention and gated MLP (SwiGLU) or mixture of experts, each with a residual connection.

    Attributes:
      layer: index of the layer, which decides whether it rotates and whether it has experts.
      mix: runs the experts; None for `experts.mix`.
    """

    config: ModelConfig
    layer: int
    mix: Mix | None = None

    def setup(self):
        c = self.config
        D, F = c.hidden_size, c.intermediate_size
        K, G, H = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim

        self.attn_norm = nn.RMSNorm(epsilon=c.rms_norm_eps)
        self.q = Linear((D, K, G, H), "btd,dkgh->btkgh", c.qkv_bias)
        self.k = Linear((D, K, H), "btd,dkh->btkh", c.qkv_bias)
        self.v = Linear((D, K, H), "btd,dkh->btkh", c.qkv_bias)
        self.o = Linear((K, G, H, D), "btkgh,kghd->btd", c.output_bias)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(epsilon=c.rms_norm_eps)
            self.k_norm = nn.RMSNorm(epsilon=c.rms_norm_eps)
        self.mlp_norm = nn.RMSNorm(epsilon=c.rms_norm_eps)
        self.experts = c.experts_of(self.layer)
        if self.experts is not None:
            E, F = self.experts.count, self.experts.intermediate_size
            self.router = Linear((D, E), "btd,de->bte", use_bias=False)
            self.expert_gate, self.expert_up = ExpertLinear((E, D, F)), ExpertLinear((E, D, F))
            self.expert_down = ExpertLinear((E, F, D))
            return
        self.gate = Linear((D, F), "btd,df->btf", c.mlp_bias)
        self.up = Linear((D, F), "btd,df->btf", c.mlp_bias)
        self.down = Linear((F, D), "btf,fd->btd", c.mlp_bias)

    def queries(self, x: Float[jax.Array, "B T D"], rope: Tables) -> Float[jax.Array, "B K R H"]:
        """Map x [B, T, D] to q [B, K, T·G, H], normed and rotated as attention takes it."""
        q = self.q(self.attn_norm(x))
        if self.config.qk_norm:
            q = self.q_norm(q)
        B, T, K, G, H = q.shape
        return self._apply_rope(q, rope).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)

    def keys_values(
        self, x: Float[jax.Array, "B T D"], rope: Tables
    ) -> tuple[Float[jax.Array, "B K T H"], Float[jax.Array, "B K T H"]]:
        """Map x [B, T, D] to k, v [B, K, T, H], keys normed and rotated as they are cached."""
        y = self.attn_norm(x)
        k, v = self.k(y), self.v(y)
        if self.config.qk_norm:
            k = self.k_norm(k)
        return self._apply_rope(k, rope).transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def _apply_rope(self, x: jax.Array, rope: Tables) -> jax.Array:
        """Rotate queries or keys by their positions, unless the layer has none or attention adds them (ALiBi)."""
        return x if self.config.alibi or self.layer in self.config.nope_layers else rotate(x, rope)

    def output_and_mlp(
        self, x: Float[jax.Array, "B T D"], out: Float[jax.Array, "B K R H"]
    ) -> Float[jax.Array, "B T D"]:
        """Add attention output [B, K, T·G, H] and the MLP to the residual stream x [B, T, D]."""
        B, T, _ = x.shape
        c = self.config
        out = out.reshape(B, c.num_kv_heads, T, -1, c.head_dim)
        x = x + self.o(out.transpose(0, 2, 1, 3, 4).astype(x.dtype))
        y = self.mlp_norm(x)
        if self.experts is not None:
            return x + self._mix(y, self.experts)
        return x + self.down(nn.silu(self.gate(y)) * self.up(y))

    def _mix(self, y: jax.Array, kind: Experts) -> jax.Array:
        """Send y [B, T, D] through the experts that the router chooses."""
        share = experts.shares(self.router(y), kind)
        maps = {"gate": self.expert_gate(), "up": self.expert_up(), "down": self.expert_down()}
        if self.mix is not None:
            return self.mix(y, share, maps).astype(y.dtype)
        rows = (a.reshape(-1, a.shape[-1]) for a in (y, share))
        return experts.mix(*rows, maps).reshape(y.shape).astype(y.dtype)

    def __call__(self, x: jax.Array, rope: Tables, attend: Attend, state: Any):
        with jax.named_scope("attention"):
            k, v = self.keys_values(x, rope)
            out, state = attend(self.queries(x, rope), k, v, state)
        with jax.named_scope("output_and_mlp"):
            return self.output_and_mlp(x, out), state


class Transformer(nn.Module):
    """Embedding, L blocks, final norm and output head."""

    config: ModelConfig

    def setup(self):
        c = self.config
        self.embedding = nn.Embed(c.vocab_size, c.hidden_size, embedding_init=_INIT)
        self.blocks = [Block(c, layer) for layer in range(c.num_layers)]
        self.norm = nn.RMSNorm(epsilon=c.rms_norm_eps)
        if not c.tie_embeddings:
            self.head = Linear((c.hidden_size, c.vocab_size), "...d,dv->...v", use_bias=False)

    def embed(self, tokens: Int[jax.Array, "B T"]) -> Float[jax.Array, "B T D"]:
        """Map tokens int32 [B, T] to their embeddings [B, T, D]."""
        return look_up(self.embedding.embedding, tokens)

    def logits(self, x: Float[jax.Array, "*n D"]) -> Float32[jax.Array, "*n V"]:
        """Map hidden states [..., D] to float32 logits [..., V]."""
        y = self.norm(x)
        y = attend(self.embedding.embedding, y) if self.config.tie_embeddings else self.head(y)
        y = y.astype(jnp.float32)
        if self.config.norm_head:
            y = y / jnp.maximum(jnp.linalg.norm(self.head.weight(), axis=0), 1e-12)
        return y

    def __call__(self, tokens: jax.Array, rope: Tables, attend: Attend, states: Sequence[Any]):
        """Map tokens int32 [B, T] to float32 logits [B, T, V] and each layer's new state."""
        x = self.embed(tokens)
        new = []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block(x, rope, attend, state)
            new.append(state)
        return self.logits(x), tuple(new)
