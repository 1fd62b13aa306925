"""Writes NOTICE.md and the folder `licenses/`: authors and licences of the shipped examples."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from .debian import Package
from .examples import Example
from .languages import SHIPPED

# texts that Debian's copyright files refer to by path instead of quoting them
_COMMON_LICENCE = re.compile(r"/usr/share/common-licenses/(Apache-2\.0|Artistic|BSD)\b")

_INTRODUCTION = """\
# Origin and licences of the code examples

Written by `assets/build_code_corpus.py`; do not edit. Every example in `*.train.jsonl` and
`*.validation.jsonl` is an excerpt from one of the packages below, each under its own licence, given in the
example's field `license`.

Changes made to the excerpts: functions were cut out of their files and moved to the left margin; long
comments were shortened; rulers, linter directives and licence comments were removed; in Perl the first
paragraph of a function's POD became a comment, other POD was removed, and an opening brace below `sub name`
was moved up to it; white space at line ends was removed; some files were cut after a function.

Perl's "Artistic or GPL-1+" is used under the Artistic License 1.0 (`Artistic-1.0-Perl`), "BSD-2-clause or
Ruby" under the BSD licence. Files that any part of a package's copyright file puts under another licence
were left out.

`licenses/<Debian source package>.txt` is the package's full copyright file with copyright holders and
licence texts; `licenses/common/` holds the texts these files refer to as `/usr/share/common-licenses/`. A
GPL named in them is an alternative that was not chosen, or covers other files (mostly Debian's packaging).
"""
_FURTHER_CHANGES = """\
In the languages with braces, documentation above a function became a comment in the language's line style \
(in D a
block), up to its first parameter, example or tag; attributes and, in PHP and JavaScript, words such as
`public static` and `export` in front of `function` were removed; an opening brace below a signature was \
moved up to it,
but in D the lines of a signature were joined and the brace stayed below. In Python docstrings were \
shortened likewise.
"""


def write_notice(folder: Path, used: dict[str, list[tuple[Package, list[Example]]]]) -> None:
    """Write `NOTICE.md` for the packages that gave examples; `used` maps each language to them."""
    parts = [_INTRODUCTION] + [_FURTHER_CHANGES] * any(language not in SHIPPED for language in used)
    for language, packages in used.items():
        parts.append(f"## {language.capitalize()}\n")
        parts += [_entry(package, examples) for package, examples in packages]
    (folder / "NOTICE.md").write_text("\n".join(parts), encoding="utf-8")


def write_licences(folder: Path, packages: list[Package], base_files: Path) -> None:
    """Write each used source package's copyright file and the common licence texts; old ones are removed."""
    folder.mkdir(exist_ok=True)
    common = folder / "common"
    common.mkdir(exist_ok=True)
    for old in [*folder.glob("*.txt"), *common.glob("*.txt")]:
        old.unlink()
    for package in packages:
        (folder / licence_file_name(package)).write_text(package.copyright_text, encoding="utf-8")
    referred = {name for package in packages for name in _COMMON_LICENCE.findall(package.copyright_text)}
    for name in sorted(referred):
        text = (base_files / "usr/share/common-licenses" / name).read_text(encoding="utf-8")
        (common / f"{name}.txt").write_text(text, encoding="utf-8")


def licence_file_name(package: Package) -> str:
    """Binary packages of one source package share their copyright file."""
    return f"{package.source_package}.txt"


def _entry(package: Package, examples: list[Example]) -> str:
    """The Markdown paragraph about one package."""
    licences = Counter(example.origin.license for example in examples)
    kinds = Counter(example.kind for example in examples)
    home = package.copyright.source or package.homepage or "not stated"
    holders = _holders(package, examples)
    lines = [
        f"### {package.name} {package.version}\n",
        f"- Source: {home}",
        f"- Licence: {', '.join(sorted(licences))} ([full text](licenses/{licence_file_name(package)}))",
        f"- Examples: {kinds['function']} functions, {kinds['file']} files",
        "- Copyright:",
        *(f"  - {holder}" for holder in holders),
    ]
    return "\n".join(lines) + "\n"


def _holders(package: Package, examples: list[Example]) -> list[str]:
    """Copyright lines of every stanza that may be about a used file, in the order of the copyright file."""
    paths = sorted({example.origin.path for example in examples})
    stanzas = {stanza for path in paths for stanza in package.copyright.stanzas_for(path)}
    lines = [line for stanza in package.copyright.stanzas if stanza in stanzas for line in stanza.holders]
    # Debian's remark about the name "Expat" is sometimes indented into the copyright field
    return [line for line in dict.fromkeys(lines) if re.search(r"\d{4}|@|[A-Z]", line)]
