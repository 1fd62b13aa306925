"""The effect of short encoder windows: the base model's error rates with windows of 30 s, and with steps of
10 s and 2 s.

    make speech-local
    python benchmarks/windows.py --save        benchmarks/results/windows_cpu.md

The same clips, transcribed greedily by Whisper base without adapters; differences are paired by clip.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

import flora_train.cli  # noqa: F401  sets how threads wait, before torch is loaded

# isort: split
import torch

from flora_train.adapters.spec import BASE_ID
from flora_train.config.load import load_config
from flora_train.data.task import load_tasks
from flora_train.evaluation.bootstrap import compare_ratios
from flora_train.evaluation.speech.error_rates import word_errors
from flora_train.evaluation.speech.evaluate import evaluation_split
from flora_train.evaluation.speech.normalize import NORMALIZERS, normalizer_name
from flora_train.evaluation.speech.transcribe import DecodedClip, Request, Transcriber
from flora_train.models.loading import load_base_model, load_model_config, load_tokenizer
from flora_train.run_context import build_speech_processor, cache_folder
from flora_train.runtime.environment import available_cpus, environment

RESULT = Path(__file__).resolve().parent / "results" / "windows_cpu.md"
STEPS: tuple[float | None, ...] = (None, 10.0, 2.0)


def transcribe(step: float | None, clips: int) -> tuple[dict[str, tuple[list[str], list[str]]], float]:
    """(task -> (reference, transcript), both normalised; seconds of transcribing) with windows of this
    step."""
    words = [] if step is None else [f"audio.window_step={step}"]
    limits = [f"tasks.{task}.max_test_examples={clips}" for task in ("cs", "nl", "ro", "bg")]
    few = [
        f"tasks.{task}.{key}=4"
        for task in ("cs", "nl", "ro", "bg")
        for key in ("max_examples", "max_validation_examples")
    ]
    length = ["training.tokens_per_step=200000"]
    config = load_config(
        [
            "recipe=speech_local",
            *([] if words else ["audio.window_step=null"]),
            *words,
            *limits,
            *few,
            *length,
        ]
    )
    tokenizer = load_tokenizer(config.model)
    speech_processor = build_speech_processor(config, load_model_config(config.model), tokenizer)
    tasks = load_tasks(config, tokenizer, cache_folder(), speech_processor)
    model = load_base_model(config.model, torch.device("cpu"))
    requests, places = [], []
    for name, task in tasks.items():
        speech = config.tasks[name].speech
        assert speech is not None
        prompt, split = tuple(speech_processor.prompt(speech, name)), evaluation_split(task)
        for example in range(len(split)):
            requests.append(Request(BASE_ID, split.clip_ref(example), prompt, shares_encoding=True))
            places.append((name, str(split.sentences[example])))
    speech_processor.store.get(
        [request.clip for request in requests]
    )  # features are no part of what is measured
    texts = [""] * len(requests)

    def keep(found: DecodedClip) -> None:
        texts[found.request] = found.text

    options = config.evaluation
    writer = Transcriber(
        model,
        tokenizer,
        lambda rows: nullcontext(),
        store=speech_processor.store,
        max_new_tokens=options.max_new_tokens,
        max_rows=options.batch_rows,
    )
    started = time.perf_counter()
    writer.run(requests, keep)
    seconds = time.perf_counter() - started
    speech_processor.store.close()
    found: dict[str, tuple[list[str], list[str]]] = {}
    for (name, said), heard in zip(places, texts, strict=True):
        speech = config.tasks[name].speech
        assert speech is not None
        normalize = NORMALIZERS[normalizer_name(speech)]
        both = found.setdefault(name, ([], []))
        both[0].append(normalize(said))
        both[1].append(normalize(heard))
    return found, seconds


def report(clips: int) -> str:
    """The table, as Markdown."""
    results = [transcribe(step, clips) for step in STEPS]
    rows = [
        "| language | clips | 30 s | "
        + " | ".join(f"{step:g} s steps, difference [95 %]" for step in STEPS if step)
        + " |"
    ]
    rows.append("|---|---|---|" + "---|" * (len(STEPS) - 1))
    for name in results[0][0]:
        errors = {i: word_errors(*found[name]) for i, (found, _) in enumerate(results)}
        compared = compare_ratios(
            {i: e.total for i, e in errors.items()}, errors[0].units, samples=2000, confidence=0.95, seed=0
        )
        cells = [f"{errors[0].rate:.3f}"]
        for i in range(1, len(STEPS)):
            d = compared.differences[i, 0]
            cells.append(f"{errors[i].rate:.3f}, {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]")
        rows.append(f"| {name} | {len(errors[0].units)} | {' | '.join(cells)} |")
    seconds = " | ".join(f"{spent / results[0][1]:.2f} of the time" for _, spent in results[1:])
    rows.append(f"| time of transcribing | | {results[0][1]:.0f} s | {seconds} |")
    facts = environment()
    where = (
        f"{facts.machine.processor}, {available_cpus()} CPUs, torch {facts.packages['torch']}, "
        f"commit {facts.commit}"
    )
    return "\n".join(
        [
            "# Encoder windows: word error rate of Whisper base, normalised",
            "",
            f"{where}. `python benchmarks/windows.py --save` prints this file.",
            "Clips of up to 10 s, each padded with silence to 30 s, or to the next multiple of a step.",
            "",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=40, help="of each language")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    text = report(options.clips)
    print(text)
    if options.save:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
