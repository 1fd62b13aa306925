"""Baselines and comparison runs of recipe=clinical, and the table that puts them beside the run's adapters.

    python studies/clinical.py baselines            majority label, and TF-IDF + logistic regression
    python studies/clinical.py gated                gated residual head on features of the frozen encoder
    python studies/clinical.py full                 full fine-tuning of the encoder with transformers
    python studies/clinical.py adapters RUN         the adapters of a run; --plain-peft loads its exports
    python studies/clinical.py table [RUN] --save   the table; writes benchmarks/results/clinical_cpu.md
                                                    (--result FILE: of the methods that have run here)
    python studies/clinical.py development          settings of the first three on the development texts

Predictions are kept in outputs/clinical_study, so that what is there already is not computed again. No text
is written anywhere. The texts are built by `python assets/build_clinical_corpus.py`, the encoder by
`python assets/build_minilm.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import flora_train.cli  # noqa: F401

# isort: split
import torch
from clinical_study.bag_of_words import majority, tfidf
from clinical_study.development import development
from clinical_study.encoder import Encoder, Settings, full, gated
from clinical_study.exported import predict_all, read_run
from clinical_study.scores import SAMPLES, task_scores
from clinical_study.table import Study, write_study
from clinical_study.tasks import DATA, ROOT, SEEDS, Predictions, StudyError, StudyTask, load_tasks
from transformers.utils import logging

from flora_train.config.errors import UserError
from flora_train.runtime.environment import environment

MODEL = ROOT / "assets" / "models" / "minilm-l6"
OUTPUT = ROOT / "outputs" / "clinical_study"
RESULT = ROOT / "benchmarks" / "results" / "clinical_cpu.md"
GATED = Settings(lr=3e-4)
"""The best of 3e-4, 1e-3 and 3e-3 on the development texts (with 60 steps)."""
FULL = Settings(lr=2e-4)
"""A usual rate for an encoder of this size; `development` compares others."""


def train_each(
    method: str,
    tasks: list[StudyTask],
    predictions: Predictions,
    predict: Callable[[StudyTask, int], list[str]],
    *,
    seeds: tuple[int, ...] = SEEDS,
) -> None:
    """Predictions of a method for every task and seed that has none."""
    for task in tasks:
        for seed in seeds:
            if not predictions.has(method, task, seed):
                predictions.write(method, task, seed, predict(task, seed))
        print(f"{method} {task.key}: done", flush=True)


def heading(study: Study) -> Iterator[str]:
    """What was measured, and on which machine."""
    facts = environment()
    versions = ", ".join(f"{name} {facts.packages[name]}" for name in ("torch", "transformers", "peft"))
    yield "# Diagnoses and spam under data limits: adapters, heads, full fine-tuning, and no encoder at all"
    yield ""
    yield f"{facts.machine.processor}, {facts.machine.cpus} CPUs; {versions}. Encoder: all-MiniLM-L6-v2."
    yield ""
    yield (
        "Macro-F1 of the test texts, the mean over seeds. Intervals (95 %) resample test texts "
        f"({SAMPLES:,} times, the same for all methods); differences are paired by text. The mean over "
        "chapters counts each alike. Seeds differ in the initialisation (full fine-tuning and the gated "
        "residual head: also in the order of the texts), not in the training texts."
    )
    yield ""


def write_table(
    tasks: list[StudyTask], predictions: Predictions, run: Path | None, result: Path | None
) -> None:
    """Print the table, and write it to `result`."""
    scores = {task.key: task_scores(task, predictions) for task in tasks}
    report = read_run(run) if run is not None else None
    study = Study(tasks, scores, report)
    text = "\n".join([*heading(study), *write_study(study)]) + "\n"
    print(text)
    if result is not None:
        result.write_text(text, encoding="utf-8")


def run_command(options: argparse.Namespace) -> None:
    """Run the chosen command."""
    predictions = Predictions(options.out)
    if options.command == "development":
        tasks = load_tasks(options.data / "development", options.tasks)
        for line in development(tasks, Encoder(options.model), options.methods):
            print(line, flush=True)
        return
    tasks = load_tasks(options.data, options.tasks)
    if options.command == "baselines":
        train_each("majority", tasks, predictions, lambda task, seed: majority(task), seeds=(0,))
        train_each("tfidf", tasks, predictions, lambda task, seed: tfidf(task), seeds=(0,))
    elif options.command == "gated":
        encoder = Encoder(options.model)
        train_each("gated", tasks, predictions, lambda task, seed: gated(task, encoder, seed, GATED))
    elif options.command == "full":
        encoder = Encoder(options.model)
        train_each("full", tasks, predictions, lambda task, seed: full(task, encoder, seed, FULL))
    elif options.command == "adapters":
        encoder = Encoder(options.model)
        predict_all(options.run, tasks, encoder, predictions, plain_peft=options.plain_peft)
    else:
        write_table(tasks, predictions, options.run, options.result if options.save else None)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="such as ch01; default: all")
    common.add_argument("--data", type=Path, default=DATA, help="folder of the texts (default: %(default)s)")
    common.add_argument("--out", type=Path, default=OUTPUT, help="predictions (default: %(default)s)")
    common.add_argument("--model", type=Path, default=MODEL, help="encoder (default: %(default)s)")
    common.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("baselines", "gated", "full"):
        commands.add_parser(name, parents=[common])
    settings = commands.add_parser("development", parents=[common])
    settings.add_argument("--methods", nargs="+", default=["tfidf", "gated", "full"])
    adapters = commands.add_parser("adapters", parents=[common])
    adapters.add_argument("run", type=Path)
    adapters.add_argument("--plain-peft", action="store_true", help="load the exported adapters (slow)")
    table = commands.add_parser("table", parents=[common])
    table.add_argument("run", type=Path, nargs="?")
    table.add_argument("--save", action="store_true", help="write the result")
    table.add_argument("--result", type=Path, default=RESULT, help="the file (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line: returns 0, or 1 with a one-line error."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        run_command(options)
    except (StudyError, UserError, OSError) as error:
        print(f"clinical: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
