"""Builds `<language>.{train,validation}.jsonl`: short functions and files in Lua, Perl, Ruby and others.

    python assets/build_code_corpus.py --exclude-prompts <folder with MultiPL-E's humaneval-*.jsonl>
    python assets/build_code_corpus.py --languages php js go rust d --output assets/code_local

The sources are Debian packages under permissive licences (`code_corpus/sources.py`, `local_sources.py`),
fetched with `apt-get download`. The same package versions give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from code_corpus.debian import CorpusError, Package, fetch, unpack
from code_corpus.duplicates import NearDuplicateIndex
from code_corpus.examples import (
    Example,
    Origin,
    file_example,
    function_examples,
    normalised_source,
)
from code_corpus.languages import SHIPPED, SYNTAX
from code_corpus.licences import names_other_licence
from code_corpus.local_sources import ALL_SOURCES
from code_corpus.notice import write_licences, write_notice
from code_corpus.overlap import OverlapError, Problems, add_prompts, add_starter_problems
from code_corpus.selection import QUOTAS, choose, shuffled
from code_corpus.sources import LanguageSources

DEFAULT_OUTPUT = Path(__file__).resolve().parent / "code"
SEED = 20
MAXIMUM_FILE_BYTES = 1024 * 1024


@dataclass
class Split:
    """What became of one split of one language."""

    examples: list[Example] = field(default_factory=list)
    candidates: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def candidates_of(
    package: Package, language: str, problems: Problems, dropped: Counter[str]
) -> list[Example]:
    """All function and file examples of one package."""
    sources, found = ALL_SOURCES[language], []
    for path, raw in package.files(sources.suffixes, sources.only_under.get(package.name, "")):
        if sources.skipped and sources.skipped.search(path):
            continue
        licence = package.copyright.licence_of(path)
        if licence is None:
            dropped["file: licence not permissive"] += 1
            continue
        if names_other_licence(raw):
            dropped["file: its text names another licence"] += 1
            continue
        text, origin = normalised_source(raw), Origin(package.name, package.version, path, licence)
        found += function_examples(text, SYNTAX[language], origin, problems, dropped)
        whole = file_example(text, SYNTAX[language], origin, problems, dropped)
        found += [whole] if whole else []
    return found


def build_split(
    packages: list[Package],
    language: str,
    split: str,
    problems: Problems,
    training: NearDuplicateIndex | None,
) -> Split:
    """Extract and choose the examples of one split."""
    result = Split()
    found = []
    for package in packages:
        found += candidates_of(package, language, problems, result.dropped)
    result.candidates = len(found)
    for kind, quota in QUOTAS[split].items():
        if ALL_SOURCES[language].few_packages:
            quota = replace(quota, per_package=quota.total)
        of_kind = [example for example in found if example.kind == kind]
        result.examples += choose(of_kind, quota, SEED, training, result.dropped)
    result.examples = shuffled(result.examples, SEED)
    return result


def check_held_out(sources: LanguageSources, packages: dict[str, Package]) -> None:
    """Raise CorpusError when a validation package is built from a training package's source package."""
    train = {packages[name].source_package: name for name in sources.train}
    for name in sources.validation:
        if packages[name].source_package in train:
            raise CorpusError(
                f"{name} is held out, but {train[packages[name].source_package]} has the same source"
            )


def write_examples(file: Path, examples: list[Example]) -> None:
    """Write one JSON object a line; raises CorpusError when the file becomes too large to commit."""
    lines = [json.dumps(example.record(), ensure_ascii=False) + "\n" for example in examples]
    file.write_text("".join(lines), encoding="utf-8")
    if file.stat().st_size >= MAXIMUM_FILE_BYTES:
        raise CorpusError(
            f"{file} has {file.stat().st_size} bytes, the limit is {MAXIMUM_FILE_BYTES}; lower QUOTAS"
        )


def print_summary(language: str, split: str, result: Split) -> None:
    """One paragraph about a split: what is in it, what was left out and why."""
    kinds = Counter(example.kind for example in result.examples)
    commented = sum(example.kind == "function" and example.rank < 2 for example in result.examples)
    characters = sum(len(example.prompt + example.completion) for example in result.examples)
    licences = Counter(example.origin.license for example in result.examples)
    packages = Counter(example.origin.package for example in result.examples)
    print(
        f"{language} {split}: {kinds['function']} functions ({commented} commented), {kinds['file']} files,"
    )
    print(f"  {characters:,} characters, chosen from {result.candidates:,} candidates")
    print("  licences:", ", ".join(f"{name} {count}" for name, count in licences.most_common()))
    print("  packages:", ", ".join(f"{name} {count}" for name, count in packages.most_common()))
    print("  dropped: ", ", ".join(f"{reason} {count}" for reason, count in sorted(result.dropped.items())))


def build(output: Path, downloads: Path, languages: list[str], problems: Problems) -> None:
    """Fetch every package and write all corpus files, NOTICE.md and licenses/."""
    output.mkdir(parents=True, exist_ok=True)
    used: dict[str, list[tuple[Package, list[Example]]]] = {}
    for language in languages:
        sources = ALL_SOURCES[language]
        packages = {name: fetch(name, downloads) for name in sorted({*sources.train, *sources.validation})}
        check_held_out(sources, packages)
        training: NearDuplicateIndex | None = None
        chosen: list[Example] = []
        for split, names in (("train", sources.train), ("validation", sources.validation)):
            members = [packages[name] for name in names]
            result = build_split(members, language, split, problems, training)
            write_examples(output / f"{language}.{split}.jsonl", result.examples)
            print_summary(language, split, result)
            chosen += result.examples
            training = training or NearDuplicateIndex()
            for example in result.examples:
                training.add(example.code)
        by_package = {name: [e for e in chosen if e.origin.package == name] for name in packages}
        used[language] = [(packages[name], examples) for name, examples in by_package.items() if examples]
    write_notice(output, used)
    everyone = [package for packages in used.values() for package, _ in packages]
    write_licences(output / "licenses", everyone, unpack("base-files", downloads)[1])


def main(arguments: list[str] | None = None) -> int:
    """Command line: returns 0, or 1 with a one-line error."""
    parser = argparse.ArgumentParser(
        description="Build example corpora of programming languages from Debian packages."
    )
    parser.add_argument(
        "--languages",
        nargs="+",
        default=list(SHIPPED),
        choices=sorted(SYNTAX),
        metavar="LANGUAGE",
        help=f"of {', '.join(SYNTAX)} (default: {' '.join(SHIPPED)})",
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--exclude-prompts",
        type=Path,
        metavar="DIR",
        help="leave out what has the name or the words of MultiPL-E's problems in DIR",
    )
    parser.add_argument(
        "--exclude-problems",
        type=Path,
        metavar="YAML",
        help="the same for the problems of a file such as eval/starter_problems.yaml",
    )
    parser.add_argument(
        "--downloads", type=Path, metavar="DIR", help="keep the .deb files here and use those there"
    )
    options = parser.parse_args(arguments)
    try:
        problems = Problems()
        if options.exclude_prompts:
            add_prompts(problems, options.exclude_prompts)
        if options.exclude_problems:
            add_starter_problems(problems, options.exclude_problems)
        with tempfile.TemporaryDirectory() as scratch:
            downloads = options.downloads or Path(scratch)
            downloads.mkdir(parents=True, exist_ok=True)
            build(options.output, downloads.resolve(), options.languages, problems)
    except (CorpusError, OverlapError, OSError) as error:
        print(f"build_code_corpus: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
