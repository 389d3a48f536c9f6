"""Strings and the chat template; caches that cannot fit; logits that are not finite."""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import razor_jax
from razor_jax import RazorConfig
from razor_jax.evals import bench
from razor_jax.memory import check_memory, free_bytes
from razor_jax.params import nonfinite
from razor_jax.text import prompts
from razor_jax.text.policy import spec_for
from razor_jax.text.prompts import capacity_bucket
from tests.support import tiny

WINDOW = RazorConfig.compact(window=24, sinks=2)


@pytest.fixture(scope="module")
def params():
    return tiny.params()


def ids(params, prompt, **options):
    return prompts.encode(params, prompt, **options).rows[0]


def test_a_string_is_a_message_of_a_chat_model_and_a_text_of_others(params):
    chat = ids(params, [{"role": "user", "content": "fox"}])
    assert ids(params, "fox") == chat
    plain = tuple(params.assets.encode("fox"))
    assert ids(params, "fox", raw=True) == plain != chat
    base = params.replace(assets=dataclasses.replace(params.assets, chat_template=None))
    assert ids(base, "fox") == plain


def test_a_rendered_prompt_gets_no_second_template_and_no_second_bos(params):
    rendered = params.assets.apply_chat([{"role": "user", "content": "fox"}])
    assert ids(params, rendered) == ids(params, "fox")
    assert ids(params, rendered, raw=True) == ids(params, "fox")


def test_messages_that_end_with_an_assistant_s_are_continued(params):
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The fox "}]
    *_, text = params.assets.apply_chat(messages[:1]).partition("Who?")
    opened = params.assets.decode(ids(params, messages), skip_special=False)
    assert opened.endswith(f"Who?{text}The fox ")
    parts = [messages[0], {"role": "assistant", "content": [{"type": "text", "text": "The fox "}]}]
    assert ids(params, parts) == ids(params, messages)
    for start in ("end", "|", "Who?"):  # also in what the template writes before and after it
        begun = ids(params, [messages[0], {"role": "assistant", "content": start}])
        assert begun == tuple(params.assets.encode(params.assets.apply_chat(messages[:1]) + start, add_special=False))
    with pytest.raises(ValueError, match="the last message cannot be continued, because it is empty"):
        ids(params, [messages[0], {"role": "assistant", "content": " "}])
    altered = dataclasses.replace(
        params.assets, chat_template="{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="cannot be continued, because the chat template alters it"):
        ids(params.replace(assets=altered), messages)


def test_template_variables_reach_the_template(params):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tail }}"
    assets = dataclasses.replace(params.assets, chat_template=template)
    found = ids(params.replace(assets=assets), "fox", template_kwargs={"tail": "!"})
    assert assets.decode(found) == "fox!"


def test_read_once_ask_many_is_the_whole_conversation(params):
    """prefill(document), then generate(question, cache=…), by the chat template."""
    document, question = "the fox and a dog " * 8, " where? "
    asked = ids(params, document, part="document") + ids(params, question, part="question")
    messages = [{"role": "system", "content": document}, {"role": "user", "content": "where?"}]
    assert asked == ids(params, messages)
    cache = razor_jax.prefill(params, document, razor=WINDOW)
    found = razor_jax.generate(params, [question, "who?"], cache=cache, max_new_tokens=4)
    want = razor_jax.prefill(params, list(ids(params, document, part="document")), razor=WINDOW)
    again = razor_jax.generate(params, list(ids(params, question, part="question")), cache=want, max_new_tokens=4)
    assert found[0].tokens == again.tokens


def test_messages_are_a_document_or_follow_one(params):
    """The parts of a conversation, read one after the other, are the conversation read at once."""
    system, user = {"role": "system", "content": "the fox " * 9}, {"role": "user", "content": "where?"}
    answer, again = {"role": "assistant", "content": "there"}, {"role": "user", "content": "who?"}
    so_far = ids(params, [system, user, answer], part="document")
    assert so_far + ids(params, "who?", part="question") == ids(params, [system, user, answer, again])
    document = ids(params, system["content"], part="document")
    assert document == ids(params, [system], part="document")
    for asked in ([user], [user, answer, again], [user, answer]):
        assert document + ids(params, asked, part="question") == ids(params, [system, *asked])
    with pytest.raises(ValueError, match="begin with role 'assistant': begin with a user's"):
        ids(params, [answer, again], part="question")


def test_a_cache_that_cannot_fit_is_refused_before_it_is_made(params):
    spec = spec_for(params, None, 1000)
    with pytest.raises(MemoryError) as refused:
        check_memory(spec, batch=4, free=spec.kv_bytes(2))
    assert "a cache of 4 × 1,024 tokens needs" in str(refused.value)
    assert "512 tokens per row fit; 2 rows fit; compression takes less than dense attention" in str(refused.value)
    for tokens, fit in ((900, 896), (500, 384), (70, 64), (50, None)):
        with pytest.raises(MemoryError) as refused:
            check_memory(spec, batch=4, free=dataclasses.replace(spec, capacity=tokens).kv_bytes(4))
        assert f": {fit} tokens per row fit" in str(refused.value) or fit is None
        assert (fit is None) == ("tokens per row fit" not in str(refused.value))
        assert fit is None or capacity_bucket(fit) == fit
    compact = spec_for(params, WINDOW, 1000)
    with pytest.raises(MemoryError, match="kv_dtype='int8' takes about half"):
        check_memory(compact, batch=1, free=compact.kv_bytes(1) * 3 // 5)
    with pytest.raises(MemoryError, match=r"GiB are free$"):  # half is too much too
        check_memory(compact, batch=1, free=1)
    check_memory(spec, batch=2, free=spec.kv_bytes(2))
    for kind in ("int8", "fp8"):  # there is no smaller type to advise
        small = spec_for(params, RazorConfig.compact(window=24, kv_dtype=kind), 1000)
        with pytest.raises(MemoryError) as refused:
            check_memory(small, batch=1, free=1)
        assert "kv_dtype" not in str(refused.value)
        assert str(refused.value).endswith("GiB are free")
    assert free_bytes(jax.devices()[0]) > 0
    with pytest.raises(MemoryError, match=r"GiB are free: .* tokens per row fit"):
        razor_jax.generate(params, "fox", max_new_tokens=1_000_000_000, razor=None)


def poisoned(params, value, dtype="float32"):
    weights = jax.tree.map(lambda x: x.astype(dtype), params.weights)
    norm = weights["blocks_1"]["mlp_norm"]["scale"]
    weights["blocks_1"] = weights["blocks_1"] | {"mlp_norm": {"scale": norm.at[0].set(value)}}
    return params.replace(weights=weights)


def test_logits_that_are_not_finite_end_the_row_with_the_reason(params, caplog):
    broken = poisoned(params, jnp.nan)
    with caplog.at_level(logging.WARNING, logger="razor_jax"):
        results = razor_jax.generate(broken, ["fox", "the dog"], max_new_tokens=4, razor=None)
    assert [each.finish_reason for each in results] == ["error", "error"]
    assert [each.tokens for each in results] == [(), ()]
    [message] = [record.message for record in caplog.records if "finite" in record.message]
    assert [each.timings.decoded_tokens for each in results] == [0, 0]
    assert message.startswith(
        "rows 0, 1: the logits are not finite, because weights are not (model.layers.1.post_attention_layernorm.weight)"
    )
    with pytest.raises(ValueError, match=r"row 0: the logits are not finite, because weights are not"):
        razor_jax.score(broken, "fox", "dog", razor=None)
    with pytest.raises(ValueError, match="the logits are not finite, because weights are not"):
        bench.measure(broken, None, context=9, new_tokens=2, repeats=1)
    # A model of one's own has no names of a checkpoint.
    own = broken.replace(config=dataclasses.replace(broken.config, family="mine"))
    assert "(blocks_1/mlp_norm/scale)" in nonfinite(own)
    piece = list(razor_jax.stream(broken, "fox", max_new_tokens=4, razor=None))[-1]
    assert piece.result.finish_reason == "error"


def test_blank_text_has_no_chat_turn(params):
    for prompt in (" ", ["fox", "\n"]):
        with pytest.raises(ValueError, match="give a message, or raw=True to continue blank text"):
            razor_jax.generate(params, prompt, razor=None)
    assert razor_jax.generate(params, " ", raw=True, max_new_tokens=2, razor=None).tokens


def test_an_overflow_of_float16_is_named(params, caplog):
    with caplog.at_level(logging.WARNING, logger="razor_jax"):
        result = razor_jax.generate(poisoned(params, 60000.0, "float16"), "fox", max_new_tokens=4, razor=None)
    if result.finish_reason == "error":
        assert "float16 overflows in this model" in caplog.text
    else:
        pytest.fail("the poisoned norm did not overflow float16")


@pytest.mark.parametrize(
    ("keyword", "ours"),
    [("max_tokens", "max_new_tokens="), ("temperature", r"sampling=Temperature\(0.7\)"), ("colour", r"see help\(")],
)
def test_keywords_of_other_libraries_are_answered_with_ours(params, keyword, ours):
    for call in (razor_jax.generate, razor_jax.stream):
        with pytest.raises(TypeError, match=rf"{call.__name__}\(\) has no {keyword}=.*{ours}"):
            call(params, "fox", **{keyword: 1})
    with pytest.raises(TypeError, match=rf"prefill\(\) has no {keyword}=; see help\("):
        razor_jax.prefill(params, "fox", **{keyword: 1})
    with pytest.raises(TypeError, match=r"prefill\(\) has no kv_bits=: give razor=RazorConfig"):
        razor_jax.prefill(params, "fox", kv_bits=8)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": 5}, "stop=5: give a string or a list of strings"),
        ({"stop": [5]}, r"stop=\[5\]: give a string"),
        ({"stop": None}, "stop=None: give a string"),
        ({"template_kwargs": "x"}, "template_kwargs='x': give a dict"),
        ({"cache": "x"}, "cache is a str: give what razor_jax.prefill"),
    ],
)
def test_options_of_a_wrong_type_are_named(params, options, message):
    with pytest.raises(TypeError, match=message):
        razor_jax.generate(params, "fox", **options)


@pytest.mark.usefixtures("unchecked")
def test_what_are_no_params_is_named(params):
    calls = (razor_jax.generate, razor_jax.stream, razor_jax.prefill, lambda p, text: razor_jax.score(p, text, text))
    for call in (*calls, lambda p, text: razor_jax.Chat(p)):
        for other in ("razor-mini", params.weights):
            with pytest.raises(TypeError, match=r"params is a (str|dict): give what razor_jax.load"):
                call(other, "fox")


def test_stream_names_the_function_that_has_a_keyword_of_several_answers(params):
    with pytest.raises(TypeError, match=r"stream\(\) has no n=: give razor_jax.generate"):
        razor_jax.stream(params, "fox", n=2)


def test_objects_print_short(params):
    cache = razor_jax.init_cache(params, batch=2, capacity=64, razor=WINDOW)
    shown = {repr(x) for x in (params, cache, razor_jax.Sampling.of(top_p=0.9), razor_jax.Chat(params))}
    assert all(len(text) < 300 for text in shown), shown
    assert any("2 rows × 64 tokens" in text for text in shown)
    assert any(f"{sum(np.size(x) for x in jax.tree.leaves(params.weights)):,} parameters" in text for text in shown)


def test_params_without_a_split_are_dense(params):
    plain = razor_jax.with_heads(params, None)
    found = razor_jax.generate(plain, "fox", max_new_tokens=4)
    assert found.kv.setting == "dense"
    assert found.tokens == razor_jax.generate(plain, "fox", max_new_tokens=4, razor=None).tokens


def test_a_special_token_stops_by_its_id(params):
    """No text shows it: looked for in the text, it would never stop."""
    silent = params.weights["norm"] | {"scale": jnp.zeros_like(params.weights["norm"]["scale"])}
    speaker = params.replace(weights=params.weights | {"norm": silent})  # all logits are 0: always token 0, <s>
    said = razor_jax.generate(speaker, "fox", max_new_tokens=4, razor=None)
    assert (said.tokens, said.text) == ((0, 0, 0, 0), "")
    stopped = razor_jax.generate(speaker, "fox", max_new_tokens=4, razor=None, stop="<s>")
    assert (stopped.tokens, stopped.finish_reason) == ((0,), "stop")


def test_results_display_as_plain_tables_in_a_notebook(params):
    """Text of a model is text: no tag of it reaches the page."""
    result = razor_jax.generate(params, "fox " * 40, max_new_tokens=3, razor=WINDOW)
    shown = dataclasses.replace(result, text="<script>alert(1)</script>")._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert f"{result.kv.ratio:.2f}×" in shown
    scores = razor_jax.find_heads(params, method="random")
    for grid in (params.heads, scores):
        assert grid._repr_html_().count("<tr>") == 1 + params.config.num_layers
