"""Text of a growing row: deltas together are the whole text, stop strings stay hidden, nothing delayed is lost."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from razor_jax.text.row_output import RowOutput, check_stops, end_ids
from tests.support.tokenizers import ASSETS, KINDS

BACKENDS = {name: tokenizers.Tokenizer.from_str(assets.tokenizer_json) for name, assets in ASSETS.items()}
EOS = {name: backend.token_to_id("</s>") for name, backend in BACKENDS.items()}
MODELS = {name: dataclasses.replace(assets, eos_ids=(EOS[name],)) for name, assets in ASSETS.items()}
SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=20)


def stream(assets, tokens, stops=(), limit=10_000, sizes=(1,)) -> tuple[list[str], RowOutput]:
    """Push tokens in calls of these sizes, in turn; return the deltas and the row."""
    row, deltas, start = RowOutput(assets, stops, limit), [], 0
    while start < len(tokens):
        size = sizes[len(deltas) % len(sizes)]
        row.push(tokens[start : start + size])
        deltas.append(row.take())
        start += size
    return deltas, row


def whole(kind, tokens, stops=()) -> str:
    """Return the text that the tokenizer library decodes at once, before the stop string that is complete first."""
    text = BACKENDS[kind].decode(tokens, skip_special_tokens=True)
    ends = [(end, end - len(stop)) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    return text[: min(ends)[1]] if ends else text


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=100)
@given(
    st.one_of(st.text("😀👩‍🚀日本語 aé�the fox,", max_size=30), st.lists(st.integers(0, 399), max_size=60)),
    st.lists(st.one_of(st.text("😀日 ae�", min_size=1, max_size=3), st.just("the")), max_size=3),
    st.integers(1, 40),
    SIZES,
)
def test_deltas_together_are_the_whole_text_before_a_stop_string(kind, source, stops, limit, sizes):
    tokens = MODELS[kind].encode(source, add_special=False) if isinstance(source, str) else source
    tokens = [token for token in tokens if token != EOS[kind]]
    tokens = [*tokens[: limit - 1], EOS[kind]]
    deltas, row = stream(MODELS[kind], [*tokens, 5, 6], stops, limit, sizes)
    assert "".join(deltas) == row.text == whole(kind, tokens, stops)
    assert row.finished
    assert row.finish_reason == "stop"
    assert row.tokens == tokens[: row.stopped_at or len(tokens)]
    for delta in deltas:
        assert not any(stop in delta for stop in stops)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(st.lists(st.integers(3, 399), min_size=1, max_size=40), st.integers(1, 40), SIZES)
def test_the_limit_ends_a_row_and_nothing_delayed_is_lost(kind, tokens, limit, sizes):
    deltas, row = stream(MODELS[kind], tokens, ["never in this text"], limit, sizes)
    assert row.finished == (len(tokens) >= limit)
    assert row.tokens == tokens[:limit]
    if row.finished:
        assert "".join(deltas) == whole(kind, tokens[:limit])
        assert row.finish_reason == "length"


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_no_delta_has_half_a_character(kind):
    text = "日本語 😀 👩‍🚀 é fox"
    tokens = MODELS[kind].encode(text, add_special=False)
    assert len(tokens) > len(text)
    deltas, _ = stream(MODELS[kind], [*tokens, EOS[kind]])
    assert "".join(deltas) == text
    assert not any("�" in delta for delta in deltas)


def test_replacement_characters_of_the_answer_itself_are_shown():
    tokens = MODELS["byte_level"].encode("a�b", add_special=False)
    cut_short = [*tokens, tokens[1]]  # the first of three bytes
    assert "".join(stream(MODELS["byte_level"], tokens, limit=len(tokens))[0]) == "a�b"
    assert "".join(stream(MODELS["byte_level"], cut_short, limit=len(cut_short))[0]) == "a�b�"


def test_a_stop_string_across_calls_neither_leaks_nor_swallows_text():
    tokens = MODELS["byte_level"].encode("x ## y ### z", add_special=False)
    deltas, row = stream(MODELS["byte_level"], tokens, ["###"])
    assert "".join(deltas) == row.text == "x ## y "
    assert row.stopped_at == len(row.tokens) < len(tokens)
    # The end looks like a stop string until the row ends.
    deltas, row = stream(MODELS["byte_level"], [*tokens, EOS["byte_level"]], ["# z!"])
    assert "".join(deltas) == row.text == "x ## y ### z"
    assert deltas[-1] == "# z"


def test_an_end_token_that_is_not_special_adds_no_text():
    saved = json.loads(ASSETS["byte_level"].tokenizer_json)
    for token in saved["added_tokens"]:
        token["special"] = False
    assets = dataclasses.replace(
        ASSETS["byte_level"], tokenizer_json=json.dumps(saved), special_tokens=(), eos_ids=(1,)
    )
    assert assets.decode([1]) == "</s>"
    deltas, row = stream(assets, [*assets.encode("fox"), 1])
    assert "".join(deltas) == row.text == "fox"
    assert row.tokens[-1] == 1


def test_a_stop_string_that_is_a_special_token_ends_the_row():
    assets = MODELS["byte_level"]
    assert end_ids(assets, ["<s>", "fox"]) == (EOS["byte_level"], 0)
    # The word separator has no text by itself, but it is not special.
    assert end_ids(MODELS["metaspace_words"], [" "]) == (EOS["metaspace_words"],)
    check_stops(assets, ["<s>", "fox", "</s> fox"])  # an end token ends the row anyway
    check_stops(MODELS["metaspace_words"], [" "])
    with pytest.raises(ValueError, match=r"stop='<s>\\n' never matches, .*: give '<s>'"):
        check_stops(assets, ["<s>\n"])
    deltas, row = stream(assets, [*assets.encode("the "), 0, *assets.encode("fox")], ["<s>"])
    assert ("".join(deltas), row.finish_reason, row.stopped_at) == ("the ", "stop", None)


def test_a_row_that_fails_shows_what_was_delayed_and_keeps_an_earlier_end():
    tokens = MODELS["byte_level"].encode("fox 日 ##", add_special=False)
    cut = tokens.index(MODELS["byte_level"].encode("日", add_special=False)[-1])
    _, row = stream(MODELS["byte_level"], tokens[:cut], ["###"])
    row.fail()
    assert (row.text, row.take(), row.finished, row.finish_reason) == ("fox �", "�", True, "error")
    _, row = stream(MODELS["byte_level"], tokens, ["##"])
    row.fail()
    assert (row.text, row.finish_reason) == ("fox 日 ", "stop")


def test_a_row_without_a_tokenizer_has_tokens_only():
    row = RowOutput(None, (), 3)
    row.push([7, 8, 9, 10])
    assert (row.tokens, row.text, row.take(), row.finished, row.finish_reason) == ([7, 8, 9], "", "", True, "length")
