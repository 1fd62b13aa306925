"""What came out of a run? One plain mapping (report.json) that every form of the report is drawn from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.config.errors import UserError, first_line, user_error
from flora_train.config.json_format import read_object
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import TaskConfig
from flora_train.data.splits import seed_of
from flora_train.data.task import Task
from flora_train.data.tokenization import TokenSplit
from flora_train.evaluation.bootstrap import compare, finite
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.best_adapters import BestCheckpoint
from flora_train.training.heldout import HeldOut
from flora_train.training.step_plan import make_mixture

SCHEMA = 5
"""Of report.json; raised when a reader would miss or misread something."""
MOMENTS = 40
"""Points of the curve of what was drawn."""


KINDS: dict[str, Any] = {
    **dict.fromkeys(("facts", "curves"), dict),
    **dict.fromkeys(("tasks", "adapters", "results", "sweeps", "completions", "code", "not_measured"), list),
    "name": str,
    "speech": dict | None,
}
"""Key of report.json -> its type."""

SHOWN = 5
"""Paths of clips that were left out, for each reason."""


def build_results(
    config: RunConfig,
    folder: RunFolder,
    tasks: Mapping[str, Task],
    bank: AdapterBank,
    heldout: Mapping[str, HeldOut],
    kept: Mapping[int, BestCheckpoint],
    completions: list[dict[str, Any]],
    code: list[dict[str, Any]],
    speech: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of report.json.

    tasks: data counts, tokens served against the target share
    adapters: hyper-parameters, tokens, selected step, skipped steps, rollbacks, quarantine, and when and why it left early
    results: per task the base and every adapter on the same held-out examples: bits per byte, loss (nats per token),
             perplexity, and paired differences in bits per byte with bootstrap intervals
    sweeps: per sweep and task the members' held-out bits per byte, and which is lowest
    curves: training and held-out loss over steps, and the base's loss on the same held-out examples
    completions: prompts continued by base and adapters
    code: a suite of programming problems each, see code/summary.py
    speech: error rates of spoken tasks, see speech/summary.py
    """
    shares = make_mixture(tasks, bank.specs, config, joined=facts.get("joined")).token_shares()
    steps = folder.read_metrics("step")
    last = steps[-1] if steps else {"task_tokens": {}, "adapters": {}}
    latest: dict[str, dict[str, Any]] = {}
    for record in steps:
        latest.update(record["adapters"])
    quarantined = steps[-1].get("quarantined", {}) if steps else {}
    left = {name: facts for record in folder.read_metrics("evaluation") for name, facts in record.get("left", {}).items()}
    return {
        "schema": SCHEMA,
        "name": config.name,
        "facts": dict(facts),
        "tasks": [
            _task(task, config.tasks[name], last["task_tokens"].get(name, 0), shares.get(name, 0.0))
            for name, task in tasks.items()
        ],
        "adapters": [_adapter(bank, i, kept, latest, left, quarantined) for i in range(len(bank.specs))],
        "results": [_result(config, bank, heldout[name]) for name in heldout],
        "sweeps": sweeps_of(bank, heldout, left),
        "curves": _curves(config, folder, heldout),
        "completions": completions,
        "code": code,
        "speech": speech,
        "not_measured": not_measured(config, executed=bool(code) or speech is not None),
    }


@contextmanager
def reading_report(path: Path) -> Iterator[None]:
    """A context that draws from a report.json, which anybody may have changed: what does not fit there is a UserError."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:  # whatever a value in the wrong place makes of the code that draws
        hint = f"flora-train evaluate {path.parent.parent} renews it"
        what = f"{type(error).__name__}: {first_line(error)}"
        raise user_error(str(path), None, f"is damaged, or was written by another version ({what}): {hint}") from error


def not_measured(config: RunConfig, executed: bool) -> list[str]:
    """What a reader might take for granted and this report does not show."""
    items = [] if executed else ["Whether completions are correct: nothing was executed. Held-out loss is not pass@k."]
    items += [
        "Variation between seeds: every adapter was trained once. The intervals cover the choice of held-out examples only.",
    ]
    if not any(adapter.sweep for adapter in config.adapters.values()):
        items.append("Other learning rates: a method is shown at the learning rate of the recipe.")
    else:
        items.append("An untouched test set for sweeps: a winner was chosen by the same held-out examples, which flatters it.")
    if config.evaluation.select_best and config.evaluation.interval:
        items.append(
            "An untouched test set: each adapter's checkpoint was chosen by the same held-out examples"
            + (f" (the first {config.evaluation.max_examples} of each task)" if config.evaluation.max_examples else "")
            + ", which flatters all adapters a little, the base model not at all."
        )
    return items


def _task(task: Task, said: TaskConfig, tokens: int, target_share: float) -> dict[str, Any]:
    return {
        "name": task.name,
        "weight": task.weight,
        "origin": task.origin,
        "hub": said.train.hub,
        "license": said.license,
        "speech": said.speech and said.speech.language,
        "train": _counts(task.train),
        "validation": _counts(task.validation),
        "test": None if task.test is None else _counts(task.test),
        "tokens_drawn": tokens,
        "target_share": target_share,
        "epochs": tokens / max(1, int(task.train.lengths.sum())),
        "data_hash": task.data_hash,
        "heldout_hash": examples_hash(task.validation),
        "test_hash": examples_hash(task.validation if task.test is None else task.test),
    }


def examples_hash(split: TokenSplit) -> str:
    """SHA-256 of the examples themselves, whatever else their task holds: two runs with the same held-out rows have the same. Of clips it is
    that of sound and sentences, of text that of the tokens."""
    digest = sha256()
    spoken = hasattr(split, "shas")
    for name in ("shas", "samples", "sentences") if spoken else ("tokens", "offsets", "prompt_lengths", "label_bytes", "packs"):
        values = np.ascontiguousarray(getattr(split, name))
        digest.update(f"{name}\x1f{values.shape}\x1f".encode())
        digest.update("\x1f".join(values.tolist()).encode() if values.dtype.kind == "U" else values.astype(np.int64).tobytes())
    return digest.hexdigest()


def _counts(split: TokenSplit) -> dict[str, Any]:
    """Counts of a split; of clips that were left out the first SHOWN paths of each reason (all stand in clips_left_out.tsv)."""
    unusable = {
        reason: {"clips": len(paths), "first": [_from_here(path) for path in paths[:SHOWN]]}
        for reason, paths in split.counts.unusable.items()
    }
    return {**asdict(split.counts), "unusable": unusable}


def _from_here(path: str) -> str:
    """Relative to the working directory where it is below it: a report is passed on, and says nothing of its machine."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _adapter(
    bank: AdapterBank,
    adapter: int,
    kept: Mapping[int, BestCheckpoint],
    latest: Mapping[str, Any],
    left: Mapping[str, Any],
    quarantined: Mapping[str, Any],
) -> dict[str, Any]:
    spec = bank.specs[adapter]
    pool, _ = bank.location[adapter]
    return {
        "name": spec.name,
        "task": spec.task,
        "family": spec.family,
        "method": spec.method,
        "rank": spec.rank or None,
        "variant": ("residual" if spec.offset else "pure") if spec.method == "flora" else None,
        "lr": spec.lr,
        "parameters": pool.row_size,
        "tokens": latest.get(spec.name, {}).get("tokens", 0),
        "skipped_steps": latest.get(spec.name, {}).get("skipped_steps", 0),
        "selected_step": kept[adapter].step if adapter in kept else None,
        "rollbacks": latest.get(spec.name, {}).get("rollbacks", 0),
        "quarantined": quarantined.get(spec.name),
        "left": left.get(spec.name),
    }


def sweeps_of(bank: AdapterBank, heldout: Mapping[str, HeldOut], left: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per sweep and task: every setting's bits per byte, and the lowest. left: adapter name -> when and why it left early."""
    found = []
    for sweep, task in dict.fromkeys((spec.sweep, spec.task) for spec in bank.specs if spec.sweep is not None):
        members = [spec for spec in bank.specs if (spec.sweep, spec.task) == (sweep, task)]
        bits = {spec.family: heldout[task].bits_per_byte(bank.ids[spec.name]) for spec in members}
        measured = {family: value for family, value in bits.items() if math.isfinite(value)}
        found.append(
            {
                "sweep": sweep,
                "task": task,
                "winner": min(measured, key=lambda family: measured[family], default=None),
                "members": [
                    {"family": spec.family, "bits_per_byte": finite(bits[spec.family]), "left": left.get(spec.name)}
                    for spec in members
                ],
            }
        )
    return found


MOST_PAIRED = 64
"""Adapters of a task up to which the report compares each with each; of more, each with the best."""


def _result(config: RunConfig, bank: AdapterBank, heldout: HeldOut) -> dict[str, Any]:
    evaluation = config.evaluation
    comparison = compare(heldout, evaluation.bootstrap_samples, evaluation.confidence, seed_of(config.seed, heldout.task))
    ids = [a for a in heldout.nats if a != BASE_ID]
    measured = [a for a in ids if math.isfinite(heldout.bits_per_byte(a))]
    best = min(measured, key=heldout.bits_per_byte, default=None)

    def contender(adapter: int) -> dict[str, Any]:
        loss = heldout.loss(adapter)
        facts = {
            "bits_per_byte": comparison.contenders[adapter].record(),
            "loss": finite(loss),
            "perplexity": finite(math.exp(min(loss, 700.0))),
        }
        if adapter == BASE_ID:
            return {"name": "base", "family": "base", **facts}
        difference = comparison.differences[adapter, BASE_ID]
        spec = bank.specs[adapter]
        return {
            "name": spec.name,
            "family": spec.family,
            **facts,
            "difference_to_base": difference.record(),
            "best": adapter == best,
        }

    return {
        "task": heldout.task,
        "examples": len(heldout.label_bytes),
        "label_tokens": int(heldout.label_tokens.sum()),
        "label_bytes": int(heldout.label_bytes.sum()),
        "confidence": evaluation.confidence,
        "base": contender(BASE_ID),
        "contenders": [contender(a) for a in ids],
        "differences": [
            {"a": bank.specs[a].family, "b": bank.specs[b].family, "bits_per_byte": comparison.differences[a, b].record()}
            for a, b in combinations(ids, 2)
            if len(ids) <= MOST_PAIRED or best in (a, b)
        ],
    }


def _curves(config: RunConfig, folder: RunFolder, heldout: Mapping[str, HeldOut]) -> dict[str, Any]:
    """`training` and `heldout`: adapter -> [[step, nats per token], ...]; `drawn`: task -> [[step, tokens so far], ...], at most MOMENTS; `base`: task -> the base model's nats per token
    on the examples of `heldout`, the first `heldout_examples` of each task (null: all)."""
    first = config.evaluation.max_examples
    curves: dict[str, dict[str, list[list[float | None]]]] = {"training": {}, "heldout": {}}
    for kind, curve in (("step", "training"), ("evaluation", "heldout")):
        for record in folder.read_metrics(kind):
            for name, facts in record["adapters"].items():
                curves[curve].setdefault(name, []).append([record["step"], finite(facts["loss"])])
    base = {name: finite(judged.loss(BASE_ID, first)) for name, judged in heldout.items()}
    steps = folder.read_metrics("step")
    moments = [steps[i] for i in sorted({round(i * (len(steps) - 1) / MOMENTS) for i in range(MOMENTS + 1)})] if steps else []
    drawn = {name: [[record["step"], record["task_tokens"].get(name, 0)] for record in moments] for name in heldout}
    return {**curves, "drawn": drawn, "base": base, "heldout_examples": first}


def read_report(folder: RunFolder) -> dict[str, Any]:
    """report.json of a run. Raises UserError if there is none yet."""
    path = folder.evaluation / "report.json"
    if not path.exists():
        raise user_error(
            "run",
            str(folder.path),
            "has no report yet: it did not finish; train it on with resume=true, or let flora-train evaluate judge what it kept",
        )
    renewed = f"flora-train evaluate {folder.path} renews it"
    results = read_object(path, renewed)
    if results.get("schema") != SCHEMA:
        hint = f"was written by another version (schema {results.get('schema')}, ours is {SCHEMA}): {renewed}"
        raise user_error(str(path), None, hint)
    if wrong := [key for key, kind in KINDS.items() if not isinstance(results.get(key), kind)]:
        raise user_error(str(path), None, f"is damaged ({wrong[0]} is missing or of another type): {renewed}")
    return results
