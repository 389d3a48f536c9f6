"""`razor-jax cache`: what this package keeps in the user's cache folder, and how to clear it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import huggingface_hub.constants
import jax
import typer

from ..compilation import track_compilation, user_cache
from . import terminal
from .options import JsonOption
from .terminal import note, print_json

app = typer.Typer(
    cls=terminal.Commands,
    no_args_is_help=True,
    help="Compiled programs, heads, fitted methods, verdicts on kernels, downloads.",
)


@app.command("list")
def list_caches(as_json: JsonOption = False) -> None:
    """Show where compiled programs, heads, fitted methods, verdicts on kernels and downloads are, and their size."""
    found = {kind: {"folder": str(folder), "bytes": _size(folder)} for kind, folder in _folders().items()}
    if as_json:
        print_json(found)
        return
    for kind, about in found.items():
        typer.echo(f"{kind:10s} {about['bytes'] / 2**20:10,.1f} MiB  {about['folder']}")


@app.command()
def clear(
    what: Annotated[
        list[str] | None,
        typer.Argument(help="programs, heads, kernels, methods; without: all but methods, which take minutes to fit."),
    ] = None,
) -> None:
    """Delete compiled programs, remembered heads and verdicts on kernels, which are made again when they are needed."""
    folders, kinds = _folders(), what or ("programs", "heads", "kernels")
    for kind in kinds:
        if kind == "downloads":
            raise typer.BadParameter("downloads are shared with other programs: use `hf cache delete`")
        if kind not in folders:
            raise typer.BadParameter(f"{kind!r}: must be programs, heads, kernels or methods")
        if not folders[kind].is_relative_to(user_cache()):
            raise typer.BadParameter(f"other programs may use {folders[kind]} too: delete what you know in it by hand")
    for kind in kinds:
        size = _size(folders[kind])
        shutil.rmtree(folders[kind], ignore_errors=True)
        note(f"{kind}: freed {(size - _size(folders[kind])) / 2**20:,.1f} MiB in {folders[kind]}")


def _folders() -> dict[str, Path]:
    track_compilation()
    programs = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "programs": Path(programs or user_cache() / "xla"),  # None where that cannot be made
        "heads": user_cache() / "heads",
        "kernels": user_cache() / "kernels",
        "methods": user_cache() / "methods",
        "downloads": Path(huggingface_hub.constants.HF_HUB_CACHE),
    }


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder, 0 for none; links are not followed."""
    return sum((Path(root) / name).lstat().st_size for root, _, names in os.walk(folder) for name in names)
