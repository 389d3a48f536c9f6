"""The bytes of tokens, as log probabilities show them, against llguidance."""

from pathlib import Path

import llguidance
import pytest

import razor_jax
from razor_jax import Assets
from razor_jax.server.choice import completion_token, finite
from razor_jax.server.tokenize import token_text
from tests.support import tiny

MINI = Path(razor_jax.__file__).parent / "assets" / "razor-mini"


@pytest.mark.parametrize("assets", [tiny.assets(), Assets.read(MINI)], ids=["bytes", "razor-mini"])
def test_bytes_of_every_token_are_those_of_llguidance(assets):
    """Also of tokens that are a part of a character."""
    oracle = llguidance.LLTokenizer(assets.tokenizer_json)
    ordinary = [token for token in range(assets.vocab_size) if not oracle.is_special_token(token)]
    assert len(ordinary) > 250
    wrong = [token for token in ordinary if token_text(assets, token)[1] != oracle.decode_bytes([token])]
    assert not wrong


def test_a_part_of_a_character_is_written_as_bytes():
    """As OpenAI's completions do; and an id without a token is empty."""
    assets = tiny.assets()
    parts = assets.encode("é", add_special=False)
    assert [completion_token(assets, token) for token in parts] == [r"bytes:\xc3", r"bytes:\xa9"]
    assert token_text(assets, 10_000) == ("", b"")


@pytest.mark.parametrize("value", [float("-inf"), float("nan"), -1e30])
def test_no_log_probability_is_infinite(value):
    """JSON has neither infinity nor NaN."""
    assert finite(value) == -9999.0
