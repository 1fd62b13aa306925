"""A mkdocs hook: copies the files of the source tree that pages link to (`../tests/...`) into the site.

A link to a missing file fails the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()\.\./([^)#]+)(#[^)]*)?(\))")


def on_files(files: Any, config: Any) -> Any:
    for page in list(files.documentation_pages()):
        for _, path, _, _ in LINK.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            source = ROOT / path
            if not source.exists():
                raise PluginError(f"{page.src_uri}: ../{path} is not in the source tree")
            name = _name(path)
            if files.get_file_from_path(name) is None:
                files.append(
                    _listing(config, name, source) if source.is_dir() else _copy(config, name, source)
                )
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(lambda link: f"{link[1]}{up}{_name(link[2])}{link[3] or ''}{link[4]}", markdown)


def _name(path: str) -> str:
    """Path in the site: pages and images keep their names, other files become text."""
    source = ROOT / path
    if source.is_dir():
        return f"source/{path.rstrip('/')}/index.md"
    return f"source/{path}" if source.suffix in (".md", ".html", ".png", ".svg") else f"source/{path}.txt"


def _copy(config: Any, name: str, source: Path) -> File:
    content = source.read_bytes()
    if source.suffix == ".md":
        content = LINK_ANY.sub(r"\1", content.decode("utf-8")).encode()
    return File.generated(config, name, content=content, inclusion=_hidden())


def _listing(config: Any, name: str, source: Path) -> File:
    rows = [f"- `{file.relative_to(ROOT)}`" for file in sorted(source.rglob("*.py"))]
    return File.generated(
        config, name, content="\n".join([f"# {source.relative_to(ROOT)}", "", *rows, ""]), inclusion=_hidden()
    )


LINK_ANY = re.compile(r"\[([^\]]*)\]\((?!https?:)[^)]+\)")
"""Links between results, of which the site keeps the text."""


def _hidden() -> Any:
    """Inclusion level of files that are not in the navigation, without a warning."""
    from mkdocs.structure.files import InclusionLevel

    return InclusionLevel.NOT_IN_NAV
