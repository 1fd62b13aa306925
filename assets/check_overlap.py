"""Finds evaluation problems in finished training data; exit status 1 and the names of the examples.

    python assets/check_overlap.py --prompts <folder with humaneval-*.jsonl> \\
        --problems eval/starter_problems.yaml assets/code assets/code_local
    python assets/check_overlap.py --problems eval/starter_problems.yaml --run \\
        assets/preference_problems/training_problems.yaml
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from code_corpus.languages import SYNTAX
from code_corpus.overlap import OverlapError, Problems, add_prompts, add_starter_problems, normalised_name

TABLE_SUFFIXES = (".yaml", ".yml")


def examples(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(where, language, text) of every example in a folder's `<language>.<split>.jsonl`; OverlapError without
    any."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise OverlapError(f"{folder}: no *.jsonl; build it with assets/build_code_corpus.py")
    for file in files:
        language = file.name.split(".")[0]
        if language not in SYNTAX:
            raise OverlapError(f"{file}: unknown language {language!r}, not one of {', '.join(SYNTAX)}")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            row = json.loads(line)
            yield f"{file}:{number}", language, row["prompt"] + row["completion"]


def overlaps(text: str, language: str, problems: Problems) -> list[str]:
    """What `text` shares with the problems: at most one remark about names and one about words."""
    named = problems.named_in(text, SYNTAX[language].DEFINED_NAME)
    described = problems.described_in(text)
    found = [f"defines the function of {named}"] if named else []
    return found + ([f"has words of {described}"] if described else [])


def compared_examples(path: Path, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    """(where, remarks) of every example of a folder, or of every problem of a table."""
    if path.suffix in TABLE_SUFFIXES:
        yield from compared_problems(path, problems)
        return
    for where, language, text in examples(path):
        yield where, overlaps(text, language, problems)


def compared_problems(table: Path, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    """(where, remarks) of every training problem in a table like eval/starter_problems.yaml."""
    for row in (yaml.safe_load(table.read_text(encoding="utf-8")) or {}).get("problems") or ():
        remarks = []
        if named := problems.names.get(normalised_name(row["name"])):
            remarks.append(f"has the name of {named}")
        if described := problems.described_in(row["doc"]):
            remarks.append(f"has words of {described}")
        yield f"{table}: {row['name']}", remarks


def renamed_problems(tables: list[Path], options: argparse.Namespace) -> Iterator[str]:
    """One line for every training problem whose solution passes the tests of an evaluation problem."""
    # imports the executor and its configuration, which the comparison of texts does without
    from code_corpus.same_function import prompt_tests, same_functions, starter_tests

    tests = starter_tests(options.problems) if options.problems else []
    if options.prompts:
        tests += prompt_tests(options.prompts)
    for table in tables:
        for ours, theirs in same_functions(table, tests):
            yield f"{table}: {ours} is the same function as {theirs}: its solution passes all its tests"


def main(arguments: list[str] | None = None) -> int:
    """Command line: returns 0, or 1 when examples overlap or nothing can be compared."""
    parser = argparse.ArgumentParser(
        description="Check that training data does not contain evaluation problems."
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="with <language>.<split>.jsonl, or a table of training problems (.yaml)",
    )
    parser.add_argument("--prompts", type=Path, metavar="DIR", help="MultiPL-E's prompts")
    parser.add_argument("--problems", type=Path, metavar="YAML", help="starter problems")
    parser.add_argument(
        "--run",
        action="store_true",
        help="tables: also run their solutions in Lua against the tests of the problems",
    )
    options = parser.parse_args(arguments)
    if not options.prompts and not options.problems:
        parser.error("give --prompts or --problems, or both")
    problems, compared, bad = Problems(), 0, 0
    try:
        if options.prompts:
            add_prompts(problems, options.prompts)
        if options.problems:
            add_starter_problems(problems, options.problems)
        for folder in options.folders:
            for where, remarks in compared_examples(folder, problems):
                compared += 1
                for remark in remarks:
                    bad += 1
                    print(f"{where} {remark}")
        tables = [path for path in options.folders if path.suffix in TABLE_SUFFIXES]
        for line in renamed_problems(tables, options) if options.run else ():
            bad += 1
            print(line)
    except (OverlapError, OSError) as error:
        print(f"check_overlap: {error}", file=sys.stderr)
        return 1
    print(
        f"{compared} examples compared with {problems.count} problems ({len(problems.names)} names): "
        f"{bad} overlaps"
    )
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
