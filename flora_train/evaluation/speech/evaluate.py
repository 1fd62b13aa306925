"""From a bank of adapters to error rates: who transcribes what, transcripts that a kill does not lose, scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE, BASE_ID
from flora_train.config.errors import user_error
from flora_train.config.schema import RunConfig
from flora_train.data.audio.speech_processor import SpeechProcessor
from flora_train.data.audio.speech_split import SpeechSplit
from flora_train.data.task import Task
from flora_train.evaluation.speech.summary import Heard, summarise, write_summary
from flora_train.evaluation.speech.transcribe import DecodedClip, Request, Transcriber
from flora_train.runtime.checksum import fingerprint
from flora_train.runtime.distributed import on_main_process, wait_for_everyone, world
from flora_train.runtime.journal import Journal
from flora_train.runtime.progress import ProgressBar

Key = tuple[str, str, int]


@dataclass(frozen=True)
class LoggedTranscript:
    """What one adapter heard in one clip. clip_sha: of the file's bytes; adapter_sha: of the adapter's numbers ("" the base)."""

    adapter: str
    task: str
    example: int
    text: str
    ended: str
    tokens: int
    clip_sha: str
    adapter_sha: str

    @property
    def key(self) -> Key:
        return self.adapter, self.task, self.example


def transcript_log(folder: Path) -> Journal[LoggedTranscript]:
    """folder: of a run's evaluation."""
    return Journal(folder / "speech", LoggedTranscript, "transcript", "move it away, or evaluate into another output_dir")


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What transcripts are made with, as far as the configuration says it."""
    return {
        "model": config.model.path,
        "beams": config.evaluation.beams,
        "max_new_tokens": config.evaluation.max_new_tokens,
        "window_step": config.audio.window_step,
    }


def evaluation_split(task: Task) -> SpeechSplit:
    """The clips that error rates are measured on."""
    split = task.test or task.validation
    assert isinstance(split, SpeechSplit)
    return split


def evaluate_speech(
    config: RunConfig,
    tasks: Mapping[str, Task],
    model: nn.Module,
    bank: AdapterBank,
    speech_processor: SpeechProcessor,
    folder: Path,
) -> None:
    """Leaves `folder`/speech/error_rates.json (see summary.py) beside the transcripts.

    Raises UserError if transcripts are there that were made with other settings, clips or numbers of an adapter."""
    log = transcript_log(folder)
    learnt = {name: task for name, task in tasks.items() if any(spec.task == name for spec in bank.specs)}
    settings = {
        **settings_of(config),
        "weights of the base model (SHA-256)": fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        **{f"clips of tasks.{name} (SHA-256)": task.data_hash for name, task in learnt.items()},
    }
    on_main_process(partial(log.claim, settings))
    known = log.read()
    wait_for_everyone()  # all have read before one writes
    _transcribe(config, learnt, model, bank, speech_processor, log, known)
    wait_for_everyone()

    def summarise_log() -> None:
        heard = [
            Heard(entry.adapter, entry.task, entry.example, entry.text, entry.ended)
            for entry in log.read().values()
            if entry.task in learnt and entry.example < len(evaluation_split(learnt[entry.task]))
        ]
        splits = {name: evaluation_split(task) for name, task in learnt.items()}
        write_summary(summarise(config, splits, bank, heard), log.path)

    on_main_process(summarise_log)


def _transcribe(
    config: RunConfig,
    tasks: Mapping[str, Task],
    model: nn.Module,
    bank: AdapterBank,
    speech_processor: SpeechProcessor,
    log: Journal[LoggedTranscript],
    known: Mapping[tuple[Any, ...], LoggedTranscript],
) -> None:
    """Append what the log lacks: every test clip of every task, by the base and by the task's adapters, shared out to processes."""
    digests = {adapter: bank.digest(adapter) for adapter in (BASE_ID, *range(len(bank.specs)))}
    todo = _missing(tasks, bank, digests, log, known)
    # neighbours in the deal share their clip, so a process gets whole clips
    clips = sorted({(name, example) for name, example, _ in todo}, key=lambda clip: (-_window(tasks, clip), clip))
    rank, processes = world()
    mine = set(clips[rank::processes])
    work = [entry for entry in todo if entry[:2] in mine]
    if not work:
        return
    prompts = {
        name: tuple(speech_processor.prompt(speech, f"tasks.{name}"))
        for name in tasks
        if (speech := config.tasks[name].speech) is not None
    }
    requests = [
        Request(adapter, evaluation_split(tasks[name]).clip_ref(example), prompts[name], bank.shares_encoding(adapter))
        for name, example, adapter in work
    ]
    options = config.evaluation
    transcriber = Transcriber(
        model,
        speech_processor.tokenizer,
        bank.routed,
        speech_processor.store,
        options.max_new_tokens,
        options.beams,
        options.batch_rows,
        bank.blocks,
    )
    writer, done = log.writer(rank), 0
    with ProgressBar("transcribe", len(requests)) as watch:

        def report(transcript: DecodedClip) -> None:
            nonlocal done
            name, example, adapter = work[transcript.request]
            sha = str(evaluation_split(tasks[name]).shas[example])
            writer.append(
                LoggedTranscript(
                    _name(bank, adapter),
                    name,
                    example,
                    transcript.text,
                    transcript.ended,
                    transcript.tokens,
                    sha,
                    digests[adapter],
                )
            )
            done += 1
            watch.update(done, {"clips/s": f"{done / watch.seconds:.1f}"})

        transcriber.run(requests, report)


def _missing(
    tasks: Mapping[str, Task],
    bank: AdapterBank,
    digests: Mapping[int, str],
    log: Journal[LoggedTranscript],
    known: Mapping[tuple[Any, ...], LoggedTranscript],
) -> list[tuple[str, int, int]]:
    """(task, example, adapter) of every transcript that the log lacks. Raises UserError for one of other numbers or another file."""
    todo: list[tuple[str, int, int]] = []
    for name, task in tasks.items():
        adapters = [BASE_ID, *(bank.ids[spec.name] for spec in bank.specs if spec.task == name)]
        for example, sha in enumerate(evaluation_split(task).shas.tolist()):
            for adapter in adapters:
                key = (_name(bank, adapter), name, example)
                logged = known.get(key)
                if logged is None:
                    todo.append((name, example, adapter))
                elif (logged.clip_sha, logged.adapter_sha) != (sha, digests[adapter]):
                    words = "was made by other numbers of this adapter, or from another file (trained on?)"
                    raise user_error(f"{log.path}: {'/'.join(map(str, key))}", None, f"{words}: {log.another}")
    return todo


def _window(tasks: Mapping[str, Task], clip: tuple[str, int]) -> int:
    """Encoder positions of a (task, example)."""
    return evaluation_split(tasks[clip[0]]).window(clip[1])


def _name(bank: AdapterBank, adapter: int) -> str:
    return BASE if adapter == BASE_ID else bank.specs[adapter].name
