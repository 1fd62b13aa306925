"""Compares adapters of a mixed speech run with adapters that PEFT trains separately: error rates on the same
test clips.

    accelerate launch --config_file launch/single.yaml train.py recipe=speech_local python
    benchmarks/speech_alone.py outputs/speech_local --save        benchmarks/results/speech_alone_cpu.md

For every LoRA adapter of the run, PEFT trains a LoRA on a separate base model: the same clips in the same
steps, the same learning rates, clipping and initial values, in a plain loop; its last step counts. It
transcribes in the same way as the run's adapters. Its transcripts are saved in the run (eval/peft/), so that
a second call continues with the next language.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import flora_train.cli  # noqa: F401  sets how threads wait, before torch is loaded

# isort: split
from contenders.peft_run import PeftRun, batches_of

from flora_train.adapters.spec import BASE, BASE_ID
from flora_train.config.errors import UserError, user_error
from flora_train.data.splits import seed_of
from flora_train.data.tokenization import pad_token
from flora_train.evaluation.bootstrap import compare_ratios
from flora_train.evaluation.speech.error_rates import word_errors
from flora_train.evaluation.speech.evaluate import LoggedTranscript, evaluation_split
from flora_train.evaluation.speech.normalize import NORMALIZERS, normalizer_name
from flora_train.evaluation.speech.transcribe import DecodedClip, Request, Transcriber
from flora_train.run_context import RunContext, load_run
from flora_train.runtime.atomic import write_atomically
from flora_train.runtime.environment import available_cpus, environment
from flora_train.runtime.journal import Journal
from flora_train.runtime.progress import ProgressBar
from flora_train.training.optimizer import learning_rate
from flora_train.training.step_plan import make_mixture, plan_step

RESULT = Path(__file__).resolve().parent / "results" / "speech_alone_cpu.md"
ALONE = -2
"""The adapter that PEFT trained, beside the run's adapters and its base."""


def train_alone(session: RunContext, adapter: int) -> PeftRun:
    """PEFT on the batches of this adapter in the joint run, step by step."""
    config, spec = session.config, session.bank.specs[adapter]
    run, mixture = PeftRun(config, spec), make_mixture(session.tasks, session.bank.specs, config)
    pad = pad_token(session.tokenizer)
    own = 0  # steps that the adapter was in
    with ProgressBar(f"PEFT, {spec.name}", config.training.steps) as watch:
        for number in range(config.training.steps):
            plan = plan_step(
                mixture, number, session.tasks, session.bank, config.training.tokens_per_microbatch
            )
            if plan is None or adapter not in plan.label_tokens:
                continue
            batches = batches_of(plan, adapter, lambda task: session.tasks[task].train, session.collate, pad)
            loss = run.step(batches, learning_rate(spec, own))
            own += 1
            watch.update(number + 1, {"loss": f"{loss:.3f}"})
    return run


def transcribe(session: RunContext, adapter: int, run: PeftRun) -> list[str]:
    """Its transcripts of the test clips of its language."""
    config, task, speech_processor = (
        session.config,
        session.bank.specs[adapter].task,
        session.speech_processor,
    )
    speech, split = config.tasks[task].speech, evaluation_split(session.tasks[task])
    assert speech_processor is not None
    assert speech is not None
    prompt, shared = tuple(speech_processor.prompt(speech, task)), session.bank.shares_encoding(adapter)
    requests = [Request(BASE_ID, split.clip_ref(example), prompt, shared) for example in range(len(split))]
    texts = [""] * len(requests)

    def keep(found: DecodedClip) -> None:
        texts[found.request] = found.text

    options, model = config.evaluation, run.model.get_base_model()
    writer = Transcriber(
        model,
        speech_processor.tokenizer,
        lambda rows: nullcontext(),
        store=speech_processor.store,
        max_new_tokens=options.max_new_tokens,
        beams=options.beams,
        max_rows=options.batch_rows,
    )
    writer.run(requests, keep)
    return texts


def alone(session: RunContext, adapter: int) -> list[str]:
    """The transcripts of PEFT's adapter, saved once made. Raises UserError if they are of an adapter with
    other settings."""
    spec = session.bank.specs[adapter]
    file = session.folder.evaluation / "peft" / f"{spec.name}.json"
    digest = session.bank.digest(adapter)
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["joint"] != digest:
            raise user_error(str(file), None, "is from an earlier run of this name: delete it")
        return list(kept["texts"])
    texts = transcribe(session, adapter, train_alone(session, adapter))
    file.parent.mkdir(parents=True, exist_ok=True)
    record = json.dumps({"joint": digest, "texts": texts}, ensure_ascii=False, indent=1)
    write_atomically(file, lambda path: path.write_text(record, encoding="utf-8"))
    return texts


def jointly(session: RunContext) -> dict[tuple[str, str], dict[int, str]]:
    """(adapter, task) -> test clip -> transcript of the run's evaluation."""
    log = Journal(
        session.folder.evaluation / "speech", LoggedTranscript, "transcript", "evaluate the run first"
    )
    found: dict[tuple[str, str], dict[int, str]] = {}
    for entry in log.read().values():
        found.setdefault((entry.adapter, entry.task), {})[entry.example] = entry.text
    return found


def rows_of(
    session: RunContext, adapter: int, wrote: Mapping[tuple[str, str], Mapping[int, str]]
) -> list[str]:
    """One language's lines of the table."""
    bank, config = session.bank, session.config
    task = bank.specs[adapter].task
    speech, split = config.tasks[task].speech, evaluation_split(session.tasks[task])
    assert speech is not None
    normalize = NORMALIZERS[normalizer_name(speech)]
    said = [normalize(str(sentence)) for sentence in split.sentences]
    texts = {ALONE: alone(session, adapter)}
    for who in (BASE_ID, *(i for i, spec in enumerate(bank.specs) if spec.task == task)):
        written = wrote[BASE if who == BASE_ID else bank.specs[who].name, task]
        texts[who] = [written[example] for example in range(len(said))]
    errors = {who: word_errors(said, [normalize(text) for text in found]) for who, found in texts.items()}
    options = config.evaluation
    compared = compare_ratios(
        {who: found.total for who, found in errors.items()},
        errors[ALONE].units,
        samples=options.bootstrap_samples,
        confidence=options.confidence,
        seed=seed_of(config.seed, task, "error rates"),
    )
    lines = []
    for who in (BASE_ID, ALONE, *(i for i in sorted(texts) if i >= 0)):
        name = {BASE_ID: "base", ALONE: "lora, PEFT alone"}.get(who) or bank.specs[who].family
        rate = compared.contenders[who]
        cells = [
            task,
            name,
            f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}]",
            f"{rate.value / errors[BASE_ID].rate - 1:+.0%}",
        ]
        if who == ALONE:
            cells.append("")
        else:
            d = compared.differences[who, ALONE]
            cells.append(f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(session: RunContext, tasks: list[str]) -> str:
    """The result, as Markdown."""
    bank, wrote = session.bank, jointly(session)
    adapters = [
        i for i, spec in enumerate(bank.specs) if spec.method == "lora" and (not tasks or spec.task in tasks)
    ]
    lines = [line for adapter in adapters for line in rows_of(session, adapter, wrote)]
    facts = environment()
    versions = ", ".join(f"{name} {facts.packages[name]}" for name in ("torch", "transformers", "peft"))
    steps = max(bank.specs[adapter].max_steps for adapter in adapters)
    return "\n".join(
        [
            (
                f"# Speech: adapters of a mixed run of {len(bank.specs)}, and "
                "LoRA trained alone with PEFT on the same clips"
            ),
            "",
            f"{facts.machine.processor}, {available_cpus()} threads, {versions}, commit "
            f"{facts.commit}. "
            f"`python benchmarks/speech_alone.py outputs/{session.config.name} --save` prints this file.",
            f"Word error rate, normalised; {steps} steps an adapter; differences are paired by test clip, "
            f"{session.config.evaluation.confidence:.0%} intervals.",
            "",
            "| language | adapter | error rate | against the base | minus LoRA alone |",
            "|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a finished run of speech tasks")
    parser.add_argument("--tasks", nargs="*", default=[], help="only these (default: all)")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    try:
        session, _ = load_run(options.run, with_tasks=True)
        text = report(session, options.tasks)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    session.close()
    print(text)
    if options.save:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
