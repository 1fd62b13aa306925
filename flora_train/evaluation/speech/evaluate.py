"""Evaluates a bank of adapters on speech: missing transcripts are generated and journaled, then scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE, BASE_ID
from flora_train.config.errors import user_error
from flora_train.config.json_format import JsonObject
from flora_train.config.schema import RunConfig
from flora_train.data.audio.speech_processor import SpeechProcessor
from flora_train.data.audio.speech_split import SpeechSplit
from flora_train.data.task import Task
from flora_train.evaluation.speech.summary import Transcript, summarise, write_summary
from flora_train.evaluation.speech.transcribe import DecodedClip, Request, Transcriber
from flora_train.runtime.checksum import fingerprint
from flora_train.runtime.distributed import on_main_process, wait_for_everyone, world
from flora_train.runtime.journal import Journal
from flora_train.runtime.progress import ProgressBar

Key = tuple[str, str, int]
"""(adapter, task, example)"""
MissingTranscript = tuple[str, int, int]
"""(task, example, adapter id)"""


@dataclass(frozen=True)
class LoggedTranscript:
    """One adapter's transcript of one clip."""

    adapter: str
    task: str
    example: int
    text: str
    ended: str
    tokens: int
    clip_sha: str
    """SHA-256 of the clip's bytes."""
    adapter_sha: str
    """SHA-256 of the adapter's weights; empty for the base model."""

    @property
    def key(self) -> Key:
        return self.adapter, self.task, self.example


def transcript_log(folder: Path) -> Journal[LoggedTranscript]:
    """The journal of transcripts. folder: of a run's evaluation."""
    return Journal(
        folder / "speech", LoggedTranscript, "transcript", "move it away, or evaluate into another output_dir"
    )


def settings_of(config: RunConfig) -> JsonObject:
    """The settings that transcripts depend on, as far as the configuration states them."""
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
    *,
    bank: AdapterBank,
    speech_processor: SpeechProcessor,
    folder: Path,
    restart: bool = False,
) -> None:
    """Write transcripts and `folder`/speech/error_rates.json (see summary.py).

    restart: delete transcripts made with other settings or clips. Without it they raise UserError, as do
    those of other weights of an adapter.
    """
    log = transcript_log(folder)
    learnt_tasks = {spec.task for spec in bank.specs}
    tasks = {name: task for name, task in tasks.items() if name in learnt_tasks}
    settings = {
        **settings_of(config),
        "weights of the base model (SHA-256)": fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        **{f"clips of tasks.{name} (SHA-256)": task.data_hash for name, task in tasks.items()},
    }
    on_main_process(partial(log.claim, settings, restart=restart))
    evaluation = _SpeechEvaluation(config, tasks, bank, speech_processor=speech_processor, log=log)
    known = log.read()
    wait_for_everyone()  # every process has read the journal before one of them writes to it
    evaluation.transcribe(model, evaluation.missing(known))
    wait_for_everyone()
    on_main_process(evaluation.summarise)


class _SpeechEvaluation:
    """The evaluation of one run's adapters on the clips of their tasks."""

    def __init__(
        self,
        config: RunConfig,
        tasks: Mapping[str, Task],
        bank: AdapterBank,
        *,
        speech_processor: SpeechProcessor,
        log: Journal[LoggedTranscript],
    ) -> None:
        self.config, self.bank, self.speech_processor, self.log = config, bank, speech_processor, log
        self.splits = {name: evaluation_split(task) for name, task in tasks.items()}
        self.digests = {adapter: bank.digest(adapter) for adapter in (BASE_ID, *range(len(bank.specs)))}

    def missing(self, known: Mapping[tuple[Any, ...], LoggedTranscript]) -> list[MissingTranscript]:
        """The transcripts that the journal lacks: of every clip by the base model and the task's adapters.

        Raises UserError for a transcript by other weights, or of another file.
        """
        missing: list[MissingTranscript] = []
        for name, split in self.splits.items():
            adapters = [BASE_ID, *(self.bank.ids[spec.name] for spec in self.bank.specs if spec.task == name)]
            for example, sha in enumerate(split.shas.tolist()):
                for adapter in adapters:
                    key = (self._name(adapter), name, example)
                    logged = known.get(key)
                    if logged is None:
                        missing.append((name, example, adapter))
                    elif (logged.clip_sha, logged.adapter_sha) != (sha, self.digests[adapter]):
                        hint = (
                            "was made with other weights of this adapter or "
                            "from another file (was it trained further?)"
                        )
                        location = f"{self.log.path}: {'/'.join(map(str, key))}"
                        raise user_error(location, None, f"{hint}: {self.log.remedy}")
        return missing

    def transcribe(self, model: nn.Module, missing: Sequence[MissingTranscript]) -> None:
        """Generate this process's share of the missing transcripts and append them to the journal."""
        rank = world()[0]
        share = self._share(missing)
        if not share:
            return
        options = self.config.evaluation
        transcriber = Transcriber(
            model,
            self.speech_processor.tokenizer,
            self.bank.routed,
            store=self.speech_processor.store,
            max_new_tokens=options.max_new_tokens,
            beams=options.beams,
            max_rows=options.batch_rows,
            blocks=self.bank.blocks,
        )
        writer, done = self.log.writer(rank), 0
        with ProgressBar("transcribe", len(share)) as progress:

            def report(decoded: DecodedClip) -> None:
                nonlocal done
                writer.append(self._entry(share[decoded.request], decoded))
                done += 1
                progress.update(done, {"clips/s": f"{done / progress.seconds:.1f}"})

            transcriber.run(self._requests(share), report)

    def summarise(self) -> None:
        """Score all transcripts in the journal."""
        transcripts = []
        for entry in self.log.read().values():
            if entry.task in self.splits and entry.example < len(self.splits[entry.task]):
                transcripts.append(
                    Transcript(entry.adapter, entry.task, entry.example, entry.text, entry.ended)
                )
        write_summary(summarise(self.config, self.splits, self.bank, transcripts=transcripts), self.log.path)

    def _share(self, missing: Sequence[MissingTranscript]) -> list[MissingTranscript]:
        """The transcripts that this process makes: all those of a clip, so that the clip is encoded in one
        process.
        """

        def longest_first(clip: tuple[str, int]) -> tuple[int, tuple[str, int]]:
            name, example = clip
            return -self.splits[name].window(example), clip

        rank, processes = world()
        clips = sorted({(name, example) for name, example, _ in missing}, key=longest_first)
        share = set(clips[rank::processes])
        return [entry for entry in missing if entry[:2] in share]

    def _requests(self, share: Sequence[MissingTranscript]) -> list[Request]:
        prompts = {}
        for name in self.splits:
            speech = self.config.tasks[name].speech
            assert speech is not None
            prompts[name] = tuple(self.speech_processor.prompt(speech, f"tasks.{name}"))
        requests = []
        for name, example, adapter in share:
            clip = self.splits[name].clip_ref(example)
            requests.append(Request(adapter, clip, prompts[name], self.bank.shares_encoding(adapter)))
        return requests

    def _entry(self, missing: MissingTranscript, decoded: DecodedClip) -> LoggedTranscript:
        name, example, adapter = missing
        return LoggedTranscript(
            adapter=self._name(adapter),
            task=name,
            example=example,
            text=decoded.text,
            ended=decoded.ended,
            tokens=decoded.tokens,
            clip_sha=str(self.splits[name].shas[example]),
            adapter_sha=self.digests[adapter],
        )

    def _name(self, adapter: int) -> str:
        return BASE if adapter == BASE_ID else self.bank.specs[adapter].name
