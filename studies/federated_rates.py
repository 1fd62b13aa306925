"""Learning rates of recipe=federated_local, chosen on development texts: no test text is read.

    python assets/build_federated_texts.py --development     whole categories of training texts are held out
    python studies/federated_rates.py                        three rates of each strategy at alpha = 0.1

The runs are one run folder, outputs/federated_rates, and begin where they were interrupted. On two CPU cores
they take about ten minutes, most of them for full fine-tuning.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml
from federated_study.rates import GRID, rates_recipe, rates_table
from federated_study.runs import StudyError

from flora_train.cli import main as flora_train
from flora_train.config.errors import UserError
from flora_train.federated.build_report import read_federated_report
from flora_train.runtime.atomic import write_atomically
from flora_train.runtime.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "federated_local.yaml"
TEXTS = ROOT / "assets" / "federated_local"
OUTPUT = ROOT / "outputs" / "federated_rates"


def run(options: argparse.Namespace) -> None:
    """Run what has not been run, and print the table."""
    for part in ("train", "validation"):
        file = options.texts / f"development.{part}.jsonl"
        if not file.exists():
            raise StudyError(f"{file} is missing: python assets/build_federated_texts.py --development")
    content = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    made = rates_recipe(content, options.texts, rounds=options.rounds, strategies=options.strategies)
    text = yaml.safe_dump(made, sort_keys=False)
    recipe = options.output.with_suffix(".yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(recipe, lambda path: path.write_text(text, encoding="utf-8"))
    words = [f"recipe={recipe}", f"output_dir={options.output}", "resume=true", *options.overrides]
    if flora_train(["train", *words]) != 0:
        raise StudyError("the run did not finish (see above); the same command continues it")
    report = read_federated_report(RunFolder(options.output))
    for line in rates_table(report, options.strategies):
        print(line)


def main(arguments: list[str] | None = None) -> int:
    """Command line: returns 0, or 1 with a one-line error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--strategies", nargs="+", default=list(GRID), help="default: all")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="folder (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="run folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (StudyError, UserError, OSError) as error:
        print(f"federated_rates: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
