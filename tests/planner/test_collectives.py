"""Collectives read from the text of compiled programs."""

from __future__ import annotations

import pytest

from razor_jax.planner import collectives
from razor_jax.planner.collectives import Collective

# HLO as XLA writes it: a loop of four iterations with a reduction in it, a loop of unknown length, and the
# asynchronous pair of a TPU, whose start has operands and results.
PROGRAM = """HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p: bf16[2,64]) -> bf16[16,64] {
  %p = bf16[2,64]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, dimensions={0}
}

%first (p: s8[3]) -> s8[6] {
  %all-gather.4 = s8[6]{0} all-gather(%p), channel_id=1, frontend_attributes={chain_id="0"}
}

%last (p: s8[3]) -> s8[6] {
  %all-gather.5 = s8[6]{0} all-gather(%p), channel_id=1, frontend_attributes={chain_id="0"}
}

%body (carry: (s32[], f32[8,32])) -> (s32[], f32[8,32]) {
  %psum = f32[8,32]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}

%unknown (carry: (s32[], s8[100])) -> (s32[], s8[100]) {
  %exchange = s8[100]{0} all-to-all(%x), channel_id=2
}

ENTRY %main (a: f32[8,32]) -> f32[8,32] {
  %start = ((f32[4]{0}, s32[2]{0}), (f32[32]{0}, s32[16]{0}), u32[]) all-gather-start(%a, %b), dimensions={0}
  %done = (f32[32]{0}, s32[16]{0}) all-gather-done(%start)
  %sums = (f32[10]{0}, pred[8]{0}) all-reduce(%c, %d), to_apply=%add
  %gathered = bf16[16,64]{1,0} fusion(%e), kind=kCustom, calls=%fused
  %begun = s8[6]{0} fusion(%g), kind=kCustom, calls=%first
  %ended = s8[6]{0} fusion(%begun), kind=kCustom, calls=%last
  %w = (s32[], f32[8,32]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %u = (s32[], s8[100]) while(%t), condition=%cond, body=%unknown
  %moved = f32[6]{0} collective-permute(%f), source_target_pairs={{0,1}}
}
"""


def test_what_a_program_sends():
    assert sorted(collectives.read(PROGRAM)) == sorted(
        [
            Collective("all-gather", 32 * 4 + 16 * 4, 1),
            Collective("all-gather", 16 * 64 * 2, 1),
            Collective("all-gather", 6, 1),
            Collective("all-reduce", 10 * 4 + 8, 1),
            Collective("all-reduce", 8 * 32 * 4, 4),
            Collective("all-to-all", 100, 1, in_loop=True),
            Collective("collective-permute", 6 * 4, 1),
        ]
    )


def test_the_table_sums_up():
    table = collectives.table(collectives.read(PROGRAM)).splitlines()
    assert table[0].split() == ["all-reduce", "4", "×", "1,024", "bytes", "=", "4,096"]
    assert any(line.endswith("per loop iteration") for line in table)
    assert table[-1].split() == ["total", "10", f"{192 + 2048 + 6 + 48 + 4096 + 100 + 24:,}"]


def test_other_text_is_refused():
    with pytest.raises(ValueError, match=r"give compiled.as_text\(\)"):
        collectives.read("module @jit_f {}")
