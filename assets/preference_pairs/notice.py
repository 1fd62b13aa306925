"""NOTICE.md of the pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_TEXT = """# Origin of the pairs

Written by `assets/build_preference_pairs.py`; do not edit. The prompts are problems of our own
(`assets/preference_problems`). The programs were written by SmolLM2-135M-Instruct (Apache-2.0) with the
adapters of `recipes/preferences_sft_local.yaml`, which were trained on `assets/code`; no human wrote or
corrected them. `chosen` passed all tests of its problem in the sandbox, `rejected` did not and ended as
`rejected_status` says. `chosen_from` and `rejected_from` name the adapters. A program may repeat code that
its model has seen.

Sampled at temperature {temperature}, top-p {top_p}, at most {max_new_tokens} tokens, seed {seed}. Programs
that differ in white space only count once, programs that were cut at the limit of tokens are not used, and
a problem has at most {most_pairs} pairs in a language. Training pairs are those of
`training_problems.yaml`, held-out pairs those of `heldout_problems.yaml`.

| task | training | held out |
|---|---|---|
{rows}
"""


def write_notice(
    output: Path,
    counts: Mapping[str, Mapping[str, str]],
    settings: Mapping[str, object],
    most_pairs: int,
) -> None:
    """Write NOTICE.md. counts: task -> split -> what it has; settings: of the samples."""
    rows = []
    for task, splits in counts.items():
        rows.append(f"| {task} | {splits.get('train', 'none')} | {splits.get('validation', 'none')} |")
    named = {key: settings[key] for key in ("temperature", "top_p", "max_new_tokens", "seed")}
    text = _TEXT.format(**named, most_pairs=most_pairs, rows="\n".join(rows))
    (output / "NOTICE.md").write_text(text, encoding="utf-8")
