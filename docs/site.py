"""Hooks of the documentation's site: pages that stand elsewhere in the repository, and `llms.txt`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
#: Pages from outside `docs/`, under their names on the site.
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Any, config: Any) -> Any:
    """Adds the readme as the first page, and the results with their pictures."""
    for name, page in OUTSIDE.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_in_docs(text)))
    for path in sorted((ROOT / "benchmarks/results").iterdir()):
        if path.suffix in (".md", ".png", ".json", ".csv"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links to the results and to what only the repository has into ones that the site can follow."""
    markdown = re.sub(r"\]\((?:\.\./)?benchmarks/results/", "](results/", markdown)
    for name, target in OUTSIDE.items():
        markdown = re.sub(rf"\]\(\.\./{re.escape(name)}", f"]({target}", markdown)
    # Files of the repository, and folders: their names are enough.
    return re.sub(r"\[([^\]]+)\]\(\.\./(?!results)[^)\s]+\)", r"\1", markdown)


def on_post_build(config: Any) -> None:
    """Writes `llms.txt`: each page with its first sentences, for programs that read the site."""
    lines = [f"# {config['site_name']}", "", f"> {config['site_description']}", ""]
    for title, page in _pages(config["nav"]):
        path = ROOT / "README.md" if page == "index.md" else Path(config["docs_dir"]) / page
        address = "./" if page == "index.md" else f"{page.removesuffix('.md')}/"
        lines.append(f"- [{title}]({address}): {_first_sentences(path.read_text(encoding='utf-8'))}")
    (Path(config["site_dir"]) / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _in_docs(text: str) -> str:
    """A page of the repository's root as one of `docs/`."""
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\]\((?:LICENSE|src/[^)]*)\)", "]", text)


def _pages(nav: Any) -> list[tuple[str, str]]:
    found = []
    for item in nav:
        for title, value in item.items():
            found += [(title, value)] if isinstance(value, str) else _pages(value)
    return found


def _first_sentences(text: str) -> str:
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if re.match(r"[A-Za-z`*]", part)]
    return " ".join(paragraphs[0].split())[:300] if paragraphs else ""
