"""Groups of options that commands share.

A command that takes a parameter of a group gets each field of the group as an option: `@grouped` expands the group in
the signature that typer reads, and builds it again when the command is called.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

import razor_jax
from razor_jax import Params, RazorConfig, Sampling

from . import terminal

Model = functools.partial(typer.Option, rich_help_panel="Model")
Policy = functools.partial(typer.Option, rich_help_panel="Cache policy")
Draws = functools.partial(typer.Option, rich_help_panel="Sampling")
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")]
ModelName = Annotated[
    str,
    Model(
        "--model",
        "-m",
        help="razor-mini, razor-mini-qwen3, smollm2, a folder, a .gguf file, or a Hub id owner/name[:file.gguf].",
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Model(help="Type of the weights; auto: the checkpoint's."),
]


def grouped(command: Callable[..., Any]) -> Callable[..., Any]:
    """Expand parameters that are dataclasses of options into options of the command."""
    hints = get_type_hints(command, include_extras=True)
    parameters, groups = [], {}
    for parameter in inspect.signature(command).parameters.values():
        annotation = hints[parameter.name]
        if not dataclasses.is_dataclass(annotation):
            parameters.append(parameter.replace(annotation=annotation, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        fields = get_type_hints(annotation, include_extras=True)
        groups[parameter.name] = (annotation, [field.name for field in dataclasses.fields(annotation)])
        for field in dataclasses.fields(annotation):
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=fields[field.name]
                )
            )

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        names = tuple(given)
        for name, (group, fields) in groups.items():
            given[name] = group(**{field: given.pop(field) for field in fields})
        try:
            return command(**given)
        except typer.BadParameter as error:
            error.message = as_options(error.message, names)
            raise
        except (ValueError, MemoryError) as error:
            error.args = (as_options(str(error), names),) if len(error.args) == 1 else error.args
            raise

    # Required parameters first, as a signature demands.
    parameters.sort(key=lambda p: p.default is not inspect.Parameter.empty)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__  # type: ignore[attr-defined]
    return run


_KEYWORD = re.compile(r"""(?<![\w.,"'-])([a-z]\w*)=('[^']*'|"[^"]*"|\[[^]]*\]|-?[\w.]+)""")


def as_options(message: str, names: Collection[str]) -> str:
    """Return an error of the library with its keywords as options of a command: kv_dtype='int8' as --kv-dtype int8."""

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in names:
            return found[0]
        flag = f"--{name.replace('_', '-')}"
        return flag if value == "True" else f"{flag} {value.strip(chr(39) + chr(34))}"

    return _KEYWORD.sub(option, message).replace(", or None", "")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model, and the devices and kernels that it runs on."""

    model: ModelName = "razor-mini"
    heads: Annotated[
        str, Model(help="A razor.json; auto: the one beside the model, otherwise found once and remembered.")
    ] = "auto"
    dtype: Dtype = "auto"
    weights: Annotated[
        Literal["int8", "int4"] | None,
        Model(help="int8, int4: kernels in a half or a quarter of bfloat16's bytes; --dtype's type by default."),
    ] = None
    implementation: Annotated[
        Literal["xla", "pallas_tpu", "pallas_gpu", "mosaic_gpu"] | None,
        Model(help="Attention and cache writes; the device's kernels by default, XLA where it has none."),
    ] = None
    mesh: Annotated[
        str | None, Model(help="Devices to spread the model over, such as data=2,model=4: the product is all of them.")
    ] = None

    def load(self, *, dense: bool = False) -> Params:
        """Load the model; without heads if `dense`. Raises BadParameter for heads that dense attention would ignore."""
        if dense and self.heads != "auto":
            raise typer.BadParameter(f"--heads {self.heads}: dense attention has no use for it; leave it out")
        with terminal.working(f"loading {self.model}") as progress:
            return razor_jax.load(
                self.model,
                dtype=self.dtype,
                heads=None if dense else self.heads,
                implementation=self.implementation,
                mesh=self.mesh,
                weights=self.weights,
                progress=progress,
            )


@dataclasses.dataclass(frozen=True)
class CompressedOptions:
    """What windowed heads keep."""

    window: Annotated[int | None, Policy(min=1, help="Newest tokens that a windowed head keeps; fixes the window.")] = (
        None
    )
    sinks: Annotated[int | None, Policy(min=0, help="First tokens that a windowed head keeps.")] = None
    prefill_chunk: Annotated[
        int | None, Policy(min=1, help="Tokens per call of a streaming prefill: less memory, not exact.")
    ] = None
    kv_dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "int8", "fp8"] | None,
        Policy(help="Type of the compressed cache; the weights' type by default."),
    ] = None

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of `RazorConfig` that were given."""
        given = {name: getattr(self, name) for name in ("window", "sinks", "prefill_chunk", "kv_dtype")}
        return {name: value for name, value in given.items() if value is not None}

    def compressed(self, params: Params) -> RazorConfig:
        """Return the checkpoint's recommendation or the paper's setting, with what the options change."""
        return dataclasses.replace(params.razor or RazorConfig(), **self.changes)


@dataclasses.dataclass(frozen=True)
class PolicyOptions(CompressedOptions):
    """What windowed heads keep, or dense attention."""

    dense: Annotated[bool, Policy("--dense", help="No compression: every head keeps every token.")] = False

    def policy(self, params: Params) -> RazorConfig | None:
        """Return the policy, None for dense attention. Raises BadParameter where options contradict each other."""
        self.check()
        return None if self.dense else self.compressed(params)

    def check(self, **more: Any) -> None:
        """Raise BadParameter if --dense meets an option of compression, one of these or of `more` (None: not given).

        Raises ValueError for a number out of range.
        """
        given = self.changes | {name: value for name, value in more.items() if value is not None}
        if self.dense and given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise typer.BadParameter(f"--dense compresses nothing: leave out {names}")
        RazorConfig(**self.changes)


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen."""

    temperature: Annotated[
        float | None, Draws(help="0: the most likely token, the default unless a filter is given.")
    ] = None
    top_k: Annotated[int | None, Draws(help="Draw from the k most likely tokens.")] = None
    top_p: Annotated[float | None, Draws(help="Draw from the most likely tokens of this probability.")] = None
    min_p: Annotated[
        float | None, Draws(help="Draw from tokens at least this likely, as a share of the likeliest.")
    ] = None
    repetition_penalty: Annotated[float, Draws(help="Above 1: tokens seen before become less likely.")] = 1.0
    seed: Annotated[int, Draws(min=0, max=2**32 - 1, help="Seed of the draws.")] = 0
    stop: Annotated[list[str] | None, Draws(help="Text that ends an answer; repeatable.")] = None

    def sampling(self) -> Sampling:
        """Return the rule; greedy unless a temperature or a filter is given. Raises BadParameter."""
        filters = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.temperature == 0 and filters:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in filters)
            raise typer.BadParameter(f"--temperature 0 takes the most likely token: leave out {names}, or raise it")
        temperature = self.temperature
        if temperature is None:
            temperature = 1.0 if filters else 0.0
        try:
            return Sampling.of(
                temperature=temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error

    def tell_idle(self, params: Params) -> None:
        """Print a note about a filter that filters nothing of this model."""
        if self.top_k is not None and self.top_k >= params.config.vocab_size:
            terminal.note(
                f"--top-k {self.top_k:,} filters nothing: the vocabulary has {params.config.vocab_size:,} tokens"
            )


NewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]


def check_output(option: str, path: Path, *, file: bool = False) -> None:
    """Raise BadParameter, before minutes of work, where no file or folder can be made at `path`; `file`: no folder."""
    path = path.expanduser().absolute()
    if file and path.is_dir():
        raise typer.BadParameter(f"{option} {path} is a folder: give a file")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{option} {path}: there is no folder {path.parent}; make it first")
    folder = path if path.is_dir() else path.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise typer.BadParameter(f"{option} {path}: cannot write in {folder}, {reason}") from error


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file, "-" for stdin. A byte order mark is no text."""
    data = typer.get_binary_stream("stdin").read() if str(file) == "-" else file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start}): convert it first") from error
