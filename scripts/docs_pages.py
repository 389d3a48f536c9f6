"""Pages of the documentation site that are files elsewhere: README, CONTRIBUTING, CHANGELOG and the notebooks.

A hook of mkdocs (`mkdocs.yml`). Each file is written once; here its links become those of the site.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "colab/README.md": "notebooks/index.md",
}
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")
_FENCES = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages to mkdocs' list of files."""
    pages = {page: (ROOT / source).read_text(encoding="utf-8") for source, page in PAGES.items()}
    for page, source in zip(pages, PAGES, strict=True):
        pages[page] = with_site_links(pages[page], source, page)
    for notebook in sorted((ROOT / "colab").glob("*.ipynb")):
        pages[f"notebooks/{notebook.stem}.md"] = as_markdown(notebook)
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the text of a page in docs/ with links to files outside of it as plain text."""
    if page.file.generated_by:
        return markdown
    return with_site_links(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def with_site_links(text: str, source: str, page: str) -> str:
    """Return Markdown of the file `source` with its links as seen from `page`; files without a page lose theirs."""
    prefix = "../" * page.count("/")

    def site_link(found: re.Match[str]) -> str:
        target = (ROOT / source).parent / found[1]
        if not target.exists():
            return found[0]  # mkdocs names it, and fails
        path = target.resolve().relative_to(ROOT).as_posix()
        if path in PAGES:
            path = f"docs/{PAGES[path]}"
        elif path.startswith("colab/") and path.endswith(".ipynb"):
            path = f"docs/notebooks/{target.stem}.md"
        if path.startswith("docs/"):
            return f"]({prefix}{path.removeprefix('docs/')}{found[2] or ''})"
        return f"] (`{path}`)"

    parts = _FENCES.split(text)
    return "".join(part if part.startswith("```") else _LINK.sub(site_link, part) for part in parts)


def as_markdown(notebook: Path) -> str:
    """Return the cells of a notebook without outputs."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
        else:
            # The badge is an image elsewhere, and its link needs the repository's address.
            badge = f"Open `colab/{notebook.name}` in Colab, Kaggle or Jupyter."
            parts.append(re.sub(r"\[!\[Open In Colab\].*\)", badge, source))
    return "\n\n".join(parts) + "\n"
