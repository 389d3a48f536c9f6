"""Options that commands share, and what they make of them."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import typer

from razor_jax import Params, RazorConfig, Sampling

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="razor-mini, razor-mini-qwen3, a checkpoint folder, or a Hugging Face id.")
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Type of the weights; the checkpoint's own by default."),
]
HeadsOption = Annotated[
    str, typer.Option(help="A razor.json; auto: the one beside the model, else found once and remembered.")
]
DenseOption = Annotated[bool, typer.Option("--dense", help="No compression: every head keeps every token.")]
WindowOption = Annotated[
    int | None, typer.Option(min=1, help="Newest tokens that a windowed head keeps; fixes the window.")
]
SinksOption = Annotated[int | None, typer.Option(min=0, help="First tokens that a windowed head keeps.")]
ChunkOption = Annotated[
    int | None, typer.Option(min=1, help="Streaming prefill by so many tokens: less memory, not exact.")
]
KvDtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16", "int8", "fp8"] | None,
    typer.Option(help="Type of the compressed cache; the weights' own by default."),
]
ImplementationOption = Annotated[
    Literal["xla", "pallas_tpu", "pallas_gpu", "mosaic_gpu"] | None,
    typer.Option(help="Attention and cache writes; the device's kernels by default, XLA where it has none."),
]
MeshOption = Annotated[
    str | None,
    typer.Option(help="Devices to spread the model over, such as data=2,model=4: the product is all there are."),
]
WeightsOption = Annotated[
    Literal["int8"] | None, typer.Option(help="int8: kernels in half of bfloat16's bytes; --dtype's type by default.")
]
NewTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
TemperatureOption = Annotated[
    float | None, typer.Option(help="0: the most likely token, the default unless a filter is given.")
]
TopKOption = Annotated[int | None, typer.Option(help="Draw from the k most likely tokens.")]
TopPOption = Annotated[float | None, typer.Option(help="Draw from the most likely tokens of this probability.")]
MinPOption = Annotated[
    float | None, typer.Option(help="Draw from tokens at least so likely, as a share of the likeliest.")
]
PenaltyOption = Annotated[float, typer.Option(help="Above 1: tokens seen before become less likely.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the draws.")]
StopOption = Annotated[list[str] | None, typer.Option(help="Text that ends an answer; repeatable.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]


def policy_of(
    params: Params,
    *,
    dense: bool = False,
    window: int | None = None,
    sinks: int | None = None,
    prefill_chunk: int | None = None,
    kv_dtype: str | None = None,
) -> RazorConfig | None:
    """The checkpoint's recommendation or the paper's setting, with what the options change."""
    given = {"window": window, "sinks": sinks, "prefill_chunk": prefill_chunk, "kv_dtype": kv_dtype}
    changes = {name: value for name, value in given.items() if value is not None}
    if not dense:
        return dataclasses.replace(params.razor or RazorConfig(), **changes)
    if changes:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in changes)
        raise typer.BadParameter(f"--dense compresses nothing: leave out {names}")
    return None


def sampling_of(
    temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None, penalty: float
) -> Sampling:
    """Greedy unless a temperature or a filter is given."""
    if temperature is None:
        temperature = 0.0 if top_k is None and top_p is None and min_p is None else 1.0
    try:
        return Sampling.of(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
