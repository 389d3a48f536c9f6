"""The planner: arithmetic against live arrays, the largest sizes that fit, the command line, and refusals."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
import transformers
import typer
from typer.testing import CliRunner

import razor_jax
from razor_jax import HeadSplit, RazorConfig, functional, planner, sharding
from razor_jax import cache as kv
from razor_jax.cli import plan as cli_plan
from razor_jax.heads import store
from razor_jax.mesh import MeshPlacement
from razor_jax.models import linear, read_config, tensor_names, write_config
from razor_jax.planner import GIB, Job, compiler, find_config, find_hardware, known, plan
from razor_jax.planner.hardware import topology_names
from tests.support import devices, tiny

LLAMA = find_config("meta-llama/Llama-3.1-8B")
# Published, exact numbers of parameters.
PARAMETERS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
}


def job(**changes) -> Job:
    """Llama-3.1-8B on one v5e chip with int8 weights, 32k tokens, unless changed."""
    chip = find_hardware("v5e:1x1")
    split = planner.default_split(LLAMA)
    start = Job(LLAMA, chip, 1, 1, 1, 32768, 32768, split, RazorConfig(), "int8")
    return dataclasses.replace(start, **changes)


@pytest.mark.parametrize("name", PARAMETERS)
def test_built_in_shapes(name):
    tensors = tensor_names(known.CONFIGS[name]).values()
    assert sum(math.prod(tensor.shape) * len(tensor.names) for tensor in tensors) == PARAMETERS[name]


@pytest.mark.parametrize("name", known.CONFIGS)
def test_built_ins_are_what_a_checkpoint_says(name):
    """config.json can express each of them, and transformers reads the same shapes from it."""
    config = known.CONFIGS[name]
    fields = write_config(config)
    assert read_config(fields) == config
    if config.family == "baichuan":
        return  # not in transformers
    theirs = transformers.AutoConfig.for_model(**fields)
    assert (theirs.hidden_size, theirs.num_hidden_layers, theirs.vocab_size) == (
        config.hidden_size,
        config.num_layers,
        config.vocab_size,
    )
    assert theirs.num_key_value_heads == config.num_kv_heads
    assert getattr(theirs, "head_dim", None) in (None, config.head_dim)


def test_names_of_models(tmp_path):
    for name in ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b", "meta-llama/Meta-Llama-3.1-8B"):
        assert find_config(name) == LLAMA
    assert find_config("Qwen/Qwen2.5-72B-Instruct") == known.CONFIGS["Qwen/Qwen2.5-72B"]
    (tmp_path / "config.json").write_text(json.dumps(write_config(tiny.CONFIG)))
    assert find_config(tmp_path) == tiny.CONFIG
    with pytest.raises(
        FileNotFoundError, match=r"'gpt-5' is neither a folder nor a built-in.*config\.json.*Qwen/Qwen3-32B"
    ):
        find_config("gpt-5")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        find_config(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        find_config(tmp_path)


def test_devices():
    assert find_hardware("v5e:4x4").devices == 16
    seven = find_hardware("tpu7x:2x2x1")
    assert (seven.devices, seven.per_chip) == (8, 2)
    assert "2 per chip" in seven.describe()
    assert find_hardware("h100:8").devices == 8
    for wrong in ("v5e:3x3", "v5e", "v7x:2x2x1", "h100:0", "h100:x", "cpu"):
        with pytest.raises(ValueError, match=rf"topology='{wrong}'.*v5e:1x1 2x2.*h200"):
            find_hardware(wrong)
    assert any("v5p:" in words for words in topology_names())


MESHES = [(1, 1), (1, 4), (2, 4), (1, 8)]
POLICIES = [None, RazorConfig.compact(64), RazorConfig.compact(64, kv_dtype="int8")]


def test_bytes_are_those_of_live_arrays():
    devices.run(check_live_arrays)


def check_live_arrays():
    """Compare the bytes on every device: weights as `load` shards them, caches as `init_cache` makes them."""
    jaxtyping.config.update("jaxtyping_disable", True)  # trees of shapes and of shardings pass through
    split = HeadSplit(((1,), ()), 2)
    for (data, model), razor, kind in itertools.product(MESHES, POLICIES, ("float32", "int8")):
        # As on a CPU: no kernels, so no slots that pad tiles.
        hardware = dataclasses.replace(find_hardware(f"h100:{data * model}"), kind="cpu", device_kind="cpu")
        here = Job(tiny.CONFIG, hardware, data, model, 2, 300, 300, split, razor, kind)
        mesh = sharding.make_mesh({"data": data, "model": model}, 2, jax.devices()[: data * model])
        weights = jax.tree.map(lambda x, here=here: jnp.asarray(x, here.dtype), tiny.params(text=False).weights)
        weights = linear.quantize_tree(weights, kind) if kind == "int8" else weights
        live = jax.tree.map(jax.device_put, weights, sharding.weight_shardings(weights, mesh))
        params = razor_jax.Params(live, tiny.CONFIG, heads=split, placement=MeshPlacement(mesh))
        cache = functional.init_cache(params, batch=2, capacity=300, razor=razor)
        planned = planner.memory(here)
        assert set(on_each_device(live).values()) == {planned.weights}, here
        assert set(on_each_device(cache.layers).values()) == {planned.kv}, here
        assert kv.allocated_bytes(cache) == planned.kv * data * model


def on_each_device(tree) -> dict:
    """Return the bytes of a tree of arrays on each device."""
    found: dict = {}
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            found[shard.device] = found.get(shard.device, 0) + shard.data.nbytes
    return found


@pytest.mark.parametrize("changes", [{}, {"razor": None}, {"call": 1024}, {"hardware": find_hardware("v6e:1x1")}])
def test_largest_batch_and_context_are_tight(changes):
    start = job(**changes)
    rows, tokens = planner.largest_batch(start), planner.largest_context(start)
    assert rows >= 1
    assert tokens >= start.context
    for batch, want in ((rows, True), (rows + 1, False)):
        needed = planner.memory(dataclasses.replace(start, batch=batch)).needed
        assert (needed <= start.hardware.hbm) == want
    for length, want in ((tokens, True), (tokens + 1, False)):
        call = length if start.call == start.context else start.call
        here = dataclasses.replace(start, context=length, call=call)
        assert (planner.memory(here).needed <= start.hardware.hbm) == want


def test_nothing_fits_where_the_weights_do_not():
    start = job(config=find_config("Llama-3.1-70B"), split=planner.default_split(find_config("Llama-3.1-70B")))
    assert planner.largest_batch(start) == planner.largest_context(start) == 0


def test_rows_go_by_the_mesh():
    four = find_hardware("v5e:2x2")
    start = job(hardware=four, data=2, model=2, batch=2)
    assert planner.largest_batch(start) % 2 == 0
    with pytest.raises(ValueError, match="batch=3 does not divide over data=2"):
        planner.memory(dataclasses.replace(start, batch=3))


def test_default_split_is_as_large_as_a_search_makes_it():
    split = planner.default_split(LLAMA)
    assert sum(split.counts) == round(0.3 * 256)
    assert max(split.counts) - min(split.counts) == 1
    mha = planner.default_split(find_config("Llama-2-7b"))
    assert sum(mha.counts) == round(0.14 * 1024) + round(0.01 * 1024)
    assert sum(planner.default_split(LLAMA, 0.5).counts) == 128
    assert planner.default_split(LLAMA, 0.0).share == 0
    assert set(planner.balanced(split, 4).counts) == {4}


REFUSALS = [
    (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (19.59G) exceeds available HBM (15.75G). HLO module: jit_decode.",
        19.59,
    ),
    (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.62G of 15.75G hbm. Exceeded hbm capacity "
        "by 4.87G.",
        20.62,
    ),
]


@pytest.mark.parametrize(("message", "gib"), REFUSALS)
def test_a_refusal_says_how_much_it_needs(message, gib):
    assert compiler.needed_bytes(message) == round(gib * GIB)


def test_other_errors_are_no_refusal():
    assert compiler.needed_bytes("RESOURCE_EXHAUSTED: scoped vmem limit exceeded by 4.87M") is None
    assert compiler.needed_bytes("INTERNAL: hbm") is None


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(cli_plan.plan)

    def call(*args: object, code: int = 0):
        done = CliRunner().invoke(app, list(map(str, args)))
        assert done.exit_code == code, done.output
        return done

    return call


LOAD = ("--model", "Llama-3.1-8B", "--topology", "v5e:2x2", "--context", 32768, "--batch", 2)


def test_json(run):
    """Scripts find every field, and the numbers add up."""
    made = json.loads(run(*LOAD, "--json").stdout)
    assert made.keys() == {
        *("schema", "model", "config", "hardware", "mesh", "batch", "context", "tokens_a_call", "weights", "split"),
        *("kv_bytes_by_layout", "rows"),
    }
    assert made["mesh"] == {"data": 1, "model": 4}
    assert [row["cache"] for row in made["rows"]] == ["dense", "Razor", "Razor int8"]
    for row in made["rows"]:
        memory = row["memory"]
        assert row["needed"] == memory["weights"] + memory["kv"] + max(memory["prefill"], memory["decode"])
        assert row["headroom"] == made["hardware"]["hbm"] - row["needed"]
        assert row["fits"] == (row["headroom"] >= 0)
        assert row["compiled"] == {}
    kept = [row["memory"]["kv"] for row in made["rows"]]
    assert kept == sorted(kept, reverse=True)
    assert made["kv_bytes_by_layout"]["slot"] == kept[1] < made["kv_bytes_by_layout"]["head"]


def test_table(run):
    shown = run(*LOAD).stdout
    assert "4 devices of 15.75 GiB, 1 per chip" in shown
    assert "77 of 256 KV heads, share 0.3, spread evenly" in " ".join(shown.split())
    assert "Razor int8" in shown
    assert "-" in run("-m", "Llama-3.1-8B", "-t", "v5e:1x1", "-c", 131072).stdout.split("dense")[1].split("Razor")[0]


def test_options_change_the_plan(run, tmp_path):
    rows = json.loads(run(*LOAD, "--json", "--kv-dtype", "int8").stdout)["rows"]
    assert [row["cache"] for row in rows] == ["dense", "Razor int8"]
    assert [row["cache"] for row in json.loads(run(*LOAD, "--json", "--dense").stdout)["rows"]] == ["dense"]
    file = store.write(tmp_path / "razor.json", HeadSplit(((0, 1),) * 32, 8))
    assert json.loads(run(*LOAD, "--json", "--heads", file).stdout)["split"]["share"] == 0.25
    store.write(file, HeadSplit(((0, 1),) * 32, 8), RazorConfig.compact(window=256))
    first = json.loads(run(*LOAD, "--json", "--heads", file, "--layers", 2, "--sinks", 8).stdout)
    assert first["split"]["share"] == 0.25
    assert "sinks 8, window 256" in first["rows"][1]["setting"]
    wide = json.loads(run(*LOAD, "--json", "--mesh", "data=2,model=2", "--window", 1000).stdout)
    assert wide["mesh"] == {"data": 2, "model": 2}
    assert "window 1000" in wide["rows"][1]["setting"]
    by_head = json.loads(run(*LOAD, "--json", "--layout", "head").stdout)
    assert by_head["split"]["share"] == 0.5
    assert by_head["rows"][1]["memory"]["kv"] == by_head["kv_bytes_by_layout"]["head"]


def test_what_the_compiler_says_is_shown(run, monkeypatch):
    """The decode step compiles, the prefill is refused."""
    exchange = {"op": "all-reduce", "bytes": 1 << 20, "count": 3, "in_loop": False}
    takes = compiler.Compiled(8 * GIB, 61.0, "0.0.51", 9 * GIB, 5 * GIB, 5 * GIB, -GIB, collectives=[exchange])
    refuses = compiler.Compiled(20 * GIB, 30.0, "0.0.51", refused="RESOURCE_EXHAUSTED")
    monkeypatch.setattr(compiler, "require", lambda hardware: None)
    monkeypatch.setattr(plan, "compile_step", lambda job, step: refuses if step == "prefill" else takes)
    dense = json.loads(run(*LOAD, "--dense", "--compile", "--json").stdout)["rows"][0]
    assert (dense["fits"], dense["needed"]) == (False, 20 * GIB)
    memory = dense["memory"]
    expected = 8 * GIB / (memory["weights"] + memory["kv"] + memory["decode"]) - 1
    assert dense["compiled"]["decode"]["over_arithmetic"] == pytest.approx(expected)
    shown = " ".join(run(*LOAD, "--dense", "--compile").stdout.split())
    assert "dense, prefill: the compiler refuses it, 20.00 GiB needed" in shown
    assert "dense, decode: 8.00 GiB = arguments 9.00 + outputs 5.00 - aliased 5.00" in shown
    assert "3 collectives, 3.00 MiB" in shown


ALIBI = HeadSplit(((0, 1),) * 40, 40, scopes=((0, 0, *([9] * 18), *([5] * 20)),) * 40)


@pytest.mark.filterwarnings("ignore:attention runs without its pallas_tpu kernels")
def test_scopes_of_an_alibi_model_are_not_rounded(run, tmp_path):
    """By slot on any mesh; by head only if the heads of every scope divide."""
    load = ("-m", "Baichuan2-13B", "-c", 4096, "--batch", 2, "--heads", store.write(tmp_path / "razor.json", ALIBI))
    made = json.loads(run(*load, "-t", "v5e:2x4", "--json").stdout)
    assert made["kv_bytes_by_layout"] == {"slot": made["rows"][1]["memory"]["kv"]}
    shown = " ".join(run(*load, "-t", "v5e:2x4").stdout.split())
    assert "not by head over 8 devices: the heads of some scopes do not divide evenly" in shown
    done = run(*load, "-t", "v5e:2x4", "--layout", "head", code=1)
    assert "the groups have [2, 18, 20] heads; use a smaller model axis" in str(done.exception)
    two = json.loads(run(*load, "-t", "v5e:2x4", "--mesh", "data=4,model=2", "--batch", 4, "--json").stdout)
    assert two["split"]["share"] == ALIBI.share
    assert two["kv_bytes_by_layout"]["head"] == two["rows"][1]["memory"]["kv"] <= two["kv_bytes_by_layout"]["slot"]


def test_dense_rows_are_read_in_one_call(run):
    """Like `generate(razor=None)`, whatever the prefill chunk of the other rows."""
    whole, chunked = (json.loads(run(*LOAD, "--json", *more).stdout) for more in ((), ("--prefill-chunk", 1024)))
    assert chunked["tokens_a_call"] == 1024
    assert chunked["rows"][0] == whole["rows"][0]
    assert chunked["rows"][1]["memory"]["prefill"] < whole["rows"][1]["memory"]["prefill"]


def test_alibi_needs_a_split(run):
    with pytest.warns(UserWarning, match="ALiBi runs on XLA"):
        made = json.loads(run("-m", "Baichuan2-13B", "-t", "h200", "-c", 4096, "--json").stdout)
    assert [row["cache"] for row in made["rows"]] == ["dense"]


def test_chart(run, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need the extra 'plots': pip install -e '.[plots]'")
    run(*LOAD, "--chart", tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (("--mesh", "model=3"), ValueError, "takes 3 devices, v5e:2x2 has 4"),
        (("--mesh", "rows=4"), ValueError, "write it as data=2,model=4"),
        (("--topology", "h100", "--compile"), ValueError, "TPUs only, not h100"),
        (
            ("--layout", "head", "--mesh", "data=1,model=4", "--model", "Qwen2.5-0.5B"),
            ValueError,
            "--layout head over 4",
        ),
    ],
)
def test_what_does_not_go_together(run, options, error, words):
    done = run(*LOAD, *options, code=1)
    assert isinstance(done.exception, error)
    assert words in str(done.exception)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--share", 0.2, "--heads", "razor.json"), "not both"),
        (("--dense", "--window", 100), "leave out --window"),
        (("--dense", "--prefill-chunk", 100), "leave out --prefill-chunk"),
        (("--layers", 33), "--layers 33: Llama-3.1-8B has 32"),
    ],
)
def test_wrong_use(run, options, words):
    said = run(*LOAD, *options, code=2).output.replace("│", " ")
    assert words in " ".join(said.split())


def test_compiling_without_the_compiler_says_what_to_install(run, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name))
    done = run(*LOAD, "--compile", code=1)
    assert 'pip install "razor-jax[aot]"' in str(done.exception)
