"""flora-train evaluate: evaluate a run's kept adapters again."""

from __future__ import annotations

from collections.abc import Sequence

from flora_train.config.errors import fail
from flora_train.config.options import read_options
from flora_train.config.words import from_flags, parse_words
from flora_train.run import evaluate_run, show
from flora_train.training.origin import SWITCHES, OriginOptions
from flora_train.training.run_folder import open_run


def evaluate_words(words: Sequence[str]) -> None:
    """words: a run, and OriginOptions. Raises UserError."""
    runs, raw = from_flags(words, switches=SWITCHES)
    options = read_options(OriginOptions, parse_words(raw))
    if len(runs) != 1:
        raise fail("run", " ".join(runs) or None, "give one run: a folder in outputs/")
    evaluate_run(runs[0], **options.model_dump())
    show(open_run(runs[0])[0])
