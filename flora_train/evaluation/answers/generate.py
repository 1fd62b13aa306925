"""Generates the answers that the journal lacks, of base and adapters in mixed batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE, BASE_ID
from flora_train.config.json_format import JsonObject
from flora_train.config.schema import RunConfig
from flora_train.evaluation.answers.journal import AnswerLog, Key, LoggedAnswer
from flora_train.evaluation.answers.prompts import AnsweredTask, HeldoutPrompt, contenders_of
from flora_train.evaluation.generation import Decoder, Generated, MergedDecoding, Request, Sampling
from flora_train.runtime.checksum import fingerprint
from flora_train.runtime.distributed import on_main_process, wait_for_everyone, world
from flora_train.runtime.environment import dtype_of
from flora_train.runtime.progress import ProgressBar


@dataclass(frozen=True)
class _Wanted:
    """An answer to be generated."""

    task: AnsweredTask
    prompt: HeldoutPrompt
    adapter: int
    name: str
    """Of the adapter in the journal."""

    @property
    def key(self) -> Key:
        return self.name, self.task.name, self.prompt.example


def generate_answers(
    config: RunConfig,
    tasks: Sequence[AnsweredTask],
    model: nn.Module,
    *,
    bank: AdapterBank,
    tokenizer: Any,
    folder: Path,
) -> None:
    """Let base and adapters answer the prompts of their tasks, and append the answers to the journal.

    Collective: the main process reads the journal, so that all processes know the same answers and share the
    same prompts. folder: of the run's evaluation.
    """
    log = AnswerLog(folder)
    digests = {adapter: bank.digest(adapter) for adapter in (BASE_ID, *range(len(bank.specs)))}
    wanted = list(_all_answers(tasks, bank))
    settings = _settings(config, model)
    known = on_main_process(lambda: log.known(settings, _origins(wanted, digests)))
    share = _share([answer for answer in wanted if answer.key not in known])
    if share:
        writer = log.writer(world()[0])
        with ProgressBar("answer prompts", len(share)) as progress:
            done = 0
            for limit, group in groupby(share, key=lambda answer: answer.task.max_new_tokens):
                answers = list(group)

                def report(generated: Generated, answers: Sequence[_Wanted] = answers) -> None:
                    nonlocal done
                    answer = answers[generated.request]
                    writer.append(_entry(answer, generated, digests[answer.adapter]))
                    done += 1
                    progress.update(done, {"answers/s": f"{done / progress.seconds:.1f}"})

                decoder = Decoder(
                    model,
                    tokenizer,
                    bank.routed,
                    sampling=Sampling(temperature=0.0, top_p=1.0, seed=config.seed),
                    max_new_tokens=limit,
                    max_rows=config.evaluation.batch_rows,
                    blocks=bank.blocks,
                    merging=MergedDecoding(bank),
                )
                decoder.run([_request(answer) for answer in answers], report)
    wait_for_everyone()


def _all_answers(tasks: Sequence[AnsweredTask], bank: AdapterBank) -> Iterator[_Wanted]:
    for task in tasks:
        for prompt in task.prompts:
            for adapter in contenders_of(bank.specs, task.name):
                yield _Wanted(task, prompt, adapter, adapter_name(bank, adapter))


def adapter_name(bank: AdapterBank, adapter: int) -> str:
    """The name of a contender in the journal."""
    return BASE if adapter == BASE_ID else bank.specs[adapter].name


def _settings(config: RunConfig, model: nn.Module) -> JsonObject:
    """The settings that all answers depend on."""
    return {
        "model": config.model.path,
        "quantization": config.model.quantization,
        "weights of the base model (SHA-256)": fingerprint(model),
        "dtype": dtype_of(model),
        "decoding": "greedy",
    }


def _origins(wanted: Sequence[_Wanted], digests: Mapping[int, str]) -> dict[Key, tuple[str, str, int]]:
    shas = {(answer.task.name, answer.prompt.example): answer.prompt.sha for answer in wanted}
    origins = {}
    for answer in wanted:
        sha = shas[answer.task.name, answer.prompt.example]
        origins[answer.key] = (sha, digests[answer.adapter], answer.task.max_new_tokens)
    return origins


def _share(missing: Sequence[_Wanted]) -> list[_Wanted]:
    """The answers of this process: those of all contenders to some prompts, by limit, then longest first."""
    rank, processes = world()
    prompts = {(answer.task.name, answer.prompt.example): answer for answer in missing}
    order = sorted(
        prompts.values(),
        key=lambda answer: (answer.task.max_new_tokens, -len(answer.prompt.tokens), answer.key[1:]),
    )
    position = {(answer.task.name, answer.prompt.example): i for i, answer in enumerate(order)}

    def place(answer: _Wanted) -> int:
        return position[answer.task.name, answer.prompt.example]

    return sorted((answer for answer in missing if place(answer) % processes == rank), key=place)


def _request(answer: _Wanted) -> Request:
    return Request(
        answer.adapter,
        answer.prompt.tokens,
        keys=("",),
        stops=answer.task.stops,
        end_tokens=answer.task.end_tokens,
    )


def _entry(answer: _Wanted, generated: Generated, adapter_sha: str) -> LoggedAnswer:
    return LoggedAnswer(
        adapter=answer.name,
        task=answer.task.name,
        example=answer.prompt.example,
        answer=generated.text.strip(),
        reference=answer.prompt.reference,
        ended=generated.ended,
        tokens=generated.tokens,
        max_new_tokens=answer.task.max_new_tokens,
        prompt_sha=answer.prompt.sha,
        adapter_sha=adapter_sha,
    )
