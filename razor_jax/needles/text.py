"""The corpus of razor-mini: English prose that every Python carries, committed as extracted once.

Documentation differs between Python versions, so the text is read from `assets/text.jsonl.xz` and checked
by hash, never from the running interpreter. `python -m razor_jax.needles.text OUT` extracts it again.

One document a line: `{"name", "split", "paragraphs"}`, a paragraph being one line of prose. Documents are
split by the hash of their name; a paragraph that occurs in two documents is kept in the first one only, so
that no held-out paragraph was trained on.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import lzma
import pathlib
import re
import sys
import sysconfig
from collections.abc import Iterator

ASSETS = pathlib.Path(__file__).parents[1] / "assets"
TEXT_FILE = ASSETS / "text.jsonl.xz"
TEXT_SHA256 = "b8d78166fca43f4211c7e35fc33270e71b570c8a788b928ce76ca739a6c0c07c"
HELD_OUT_PERCENT = 20
SPLITS = ("train", "held_out")

_SKIPPED = ("site-packages", "/test", "idlelib", "lib2to3", "turtledemo", "encodings", "__pycache__")
_MIN_PARAGRAPH = 60  # characters; shorter ones are headings and table rows


@dataclasses.dataclass(frozen=True)
class Document:
    name: str
    split: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.paragraphs)


def load_documents(split: str) -> list[Document]:
    """Return all documents of one split, in name order. Only `held_out` may be used for evaluation."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; use one of {', '.join(SPLITS)}")
    return [d for d in _all_documents() if d.split == split]


def load_folder(folder: pathlib.Path, split: str | None = None) -> list[Document]:
    """Return the .txt files of a folder, a line a paragraph; with `split`, the paragraphs of that split only.

    Raises ValueError if there is none, or a file is not UTF-8.
    """
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    if not files:
        raise ValueError(f"{folder} holds no .txt file: give a folder of UTF-8 text, or leave the option out")
    try:
        texts = [file.read_text(encoding="utf-8") for file in files]
    except UnicodeDecodeError as error:
        raise ValueError(f"a file of {folder} is not UTF-8 text ({error}): convert it first") from error
    found = []
    for file, text in zip(files, texts, strict=True):
        lines = [line for line in text.splitlines() if line.strip() and split in (None, split_of(line))]
        if lines:
            found.append(Document(file.name, split or "", tuple(lines)))
    if not found:
        raise ValueError(f"the .txt files of {folder} are empty" + (f", or have no {split} line" if split else ""))
    return found


def split_of(name: str) -> str:
    """Return the split a document belongs to: a fixed hash of its name, one in five held out."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return "held_out" if digest % 100 < HELD_OUT_PERCENT else "train"


@functools.cache
def _all_documents() -> tuple[Document, ...]:
    packed = TEXT_FILE.read_bytes()
    found = hashlib.sha256(packed).hexdigest()
    if found != TEXT_SHA256:
        raise ValueError(
            f"{TEXT_FILE} has SHA-256 {found}, expected {TEXT_SHA256}: the corpus was changed or truncated; "
            "reinstall the package or restore the file"
        )
    rows = (json.loads(line) for line in lzma.decompress(packed).decode().splitlines())
    return tuple(Document(r["name"], r["split"], tuple(r["paragraphs"])) for r in rows)


def _raw_documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text): the language reference's topics, then the docstrings of every library module."""
    import pydoc_data.topics

    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield f"topic/{name}", text
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if any(part in str(path) for part in _SKIPPED):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # deliberately broken sources exist in some distributions
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        texts = [inspect.cleandoc(d) for n in nodes if (d := ast.get_docstring(n))]
        yield f"library/{path.relative_to(library).as_posix()}", "\n\n".join(texts)


def _paragraphs(text: str) -> Iterator[str]:
    """Yield prose paragraphs as single lines, without code, tables, signatures and headings."""
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        letters = sum(c.isalpha() or c == " " for c in line)
        if len(line) >= _MIN_PARAGRAPH and letters > 0.85 * len(line) and ">>>" not in line:
            yield line


def extract() -> list[Document]:
    """Return the corpus as the running interpreter would give it; documents under 400 characters are dropped."""
    seen: set[str] = set()
    documents = []
    for name, text in _raw_documents():
        paragraphs = [p for p in dict.fromkeys(_paragraphs(text)) if p not in seen]
        seen.update(paragraphs)
        if sum(map(len, paragraphs)) >= 400:
            documents.append(Document(name, split_of(name), tuple(paragraphs)))
    return documents


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m razor_jax.needles.text OUT.jsonl.xz")
    lines = [json.dumps(dataclasses.asdict(d), ensure_ascii=False) for d in extract()]
    packed = lzma.compress("\n".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)
    pathlib.Path(sys.argv[1]).write_bytes(packed)
    print(f"{len(lines)} documents, {len(packed)} bytes, SHA-256 {hashlib.sha256(packed).hexdigest()}")


if __name__ == "__main__":
    main()
