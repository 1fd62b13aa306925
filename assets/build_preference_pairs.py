"""Builds `assets/preferences/<task>.{train,validation}.jsonl`: programs that pass and programs that fail.

    flora-train solve outputs/preferences_sft_local --out outputs/preference_samples \\
        evaluation.problems=[assets/preference_problems/training_problems.yaml,\\
assets/preference_problems/heldout_problems.yaml] \\
        evaluation.temperature=0.5 evaluation.num_samples=4 --languages lua,rb
    python assets/build_preference_pairs.py outputs/preference_samples

Pairs of the training problems are for training, those of the held-out problems are held out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from preference_pairs.notice import write_notice
from preference_pairs.pairs import MOST_PAIRS, Pair, PairError, Sample, make_pairs
from preference_pairs.samples import read_samples

ASSETS = Path(__file__).resolve().parent
DEFAULT_OUTPUT = ASSETS / "preferences"
TASKS = {"lua": "lua", "pl": "perl", "rb": "ruby"}
"""Language -> task, as in data_configs."""
TABLES = {"train": "training_problems", "validation": "heldout_problems"}
"""Split -> table in assets/preference_problems, and folder of its samples."""


def write_pairs(file: Path, pairs: Sequence[Pair]) -> None:
    """One JSON object a line."""
    lines = [json.dumps(pair.row(), ensure_ascii=False) + "\n" for pair in pairs]
    file.write_text("".join(lines), encoding="utf-8")


def build(samples: Path, output: Path, most_pairs: int) -> None:
    """Write the pairs of every task and split, and NOTICE.md. Raises PairError if one has none."""
    output.mkdir(parents=True, exist_ok=True)
    counts: dict[str, dict[str, str]] = {}
    settings: dict[str, object] = {}
    for split, table in TABLES.items():
        read = read_samples(samples / table, ASSETS / "preference_problems" / f"{table}.yaml")
        settings = read.settings
        languages = sorted({sample.language for sample in read.samples})
        for language in languages:
            task = TASKS[language]
            of_language = [sample for sample in read.samples if sample.language == language]
            pairs = make_pairs(of_language, most_pairs)
            if not pairs:
                raise PairError(f"{samples / table}: no problem of {task} has programs of both kinds")
            write_pairs(output / f"{task}.{split}.jsonl", pairs)
            text = summary(of_language, pairs)
            print(f"{task} {split}: {text}")
            counts.setdefault(task, {})[split] = text
    write_notice(output, counts, settings, most_pairs)


def summary(samples: Sequence[Sample], pairs: Sequence[Pair]) -> str:
    """How many pairs there are, and of what they were made."""
    ended = Counter("passed" if sample.passed else "failed" for sample in samples)
    problems = {sample.name for sample in samples}
    paired = {pair.problem for pair in pairs}
    return (
        f"{len(pairs)} pairs of {len(paired)} of {len(problems)} problems, from {ended['passed']} programs "
        f"that pass and {ended['failed']} that do not"
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line: returns 0, or 1 with a one-line error."""
    parser = argparse.ArgumentParser(description="Pair programs that pass their tests with ones that fail.")
    parser.add_argument("samples", type=Path, help="the folder --out of flora-train solve")
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--most-pairs", type=int, default=MOST_PAIRS, help="pairs of one problem (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        build(options.samples, options.output, options.most_pairs)
    except (PairError, OSError) as error:
        print(f"build_preference_pairs: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
