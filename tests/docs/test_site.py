"""The documentation site builds without a warning: links, anchors, pages of the navigation, names of the reference."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is in the extra 'docs': pip install -e '.[docs]'"
)


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", folder]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_page_and_notebook_is_there(site):
    pages = {page.relative_to(site).with_suffix("").as_posix() for page in site.rglob("*.html")}
    assert pages >= {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert pages >= {f"notebooks/{notebook.stem}" for notebook in (ROOT / "colab").glob("*.ipynb")}
    assert pages >= {"index", "contributing", "changelog", "notebooks/index"}


def test_the_reference_comes_from_docstrings_and_the_search_knows_it(site):
    import razor_jax

    html = (site / "api.html").read_text()
    documented = set(re.findall(r'id="razor_jax\.(\w+)"', html))
    assert {"load", "generate", "prefill", "RazorConfig", "KVCache", "decode"} <= documented <= set(razor_jax.__all__)
    assert "int32 [B, T], right-padded" in html
    assert "int32 [B, T], right-padded" in (site / "search" / "search_index.json").read_text().replace("\\n", " ")


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text())
        assert not loaded, page


def test_links_of_the_readme_become_those_of_the_site(site):
    html = (site / "index.html").read_text()
    for link in ("heads.html", "planning.html", "contributing.html", "notebooks/index.html"):
        assert f'href="{link}"' in html
    assert ".md" not in " ".join(re.findall(r'href="([^"]+)"', html))


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        ("[gone](nowhere.md)", "contains a link 'nowhere.md'"),
        ("[gone](heads.md#nowhere)", "contains a link 'heads.md#nowhere'"),
        ("::: razor_jax.nowhere", "razor_jax.nowhere could not be found"),
    ],
)
def test_a_broken_link_or_name_fails_the_build(line, warning, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("heads.md", "index.md"):
        (docs / name).write_text(f"# Heads\n\n{line if name == 'index.md' else ''}\n")
    text = (ROOT / "mkdocs.yml").read_text()
    nav, hooks = text.index("nav:"), text.index("hooks:")
    text = text[:hooks] + text[text.index("theme:") : nav] + text[text.index("markdown_extensions:") :]
    text = text.replace("docs_dir: docs", f"docs_dir: {docs}").replace("paths: [.]", f"paths: [{ROOT}]")
    config = tmp_path / "mkdocs.yml"
    config.write_text(text.replace("extra_css: [site.css]", ""))
    done = build(tmp_path / "site", config)
    assert done.returncode != 0
    assert warning in done.stderr + done.stdout, done.stderr[-2000:]
