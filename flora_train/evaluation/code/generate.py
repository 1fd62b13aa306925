"""Generates the completions that a journal lacks, of all contenders in one batch, divided among the
processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flora_train.config.errors import user_error
from flora_train.evaluation.code.completion_log import CompletionLog, Key, LoggedCompletion
from flora_train.evaluation.code.contenders import Contender
from flora_train.evaluation.code.problems.problem import Problem
from flora_train.evaluation.code.problems.suites import Suite
from flora_train.evaluation.generation import Decoder, Generated, Request
from flora_train.runtime.distributed import world
from flora_train.runtime.progress import ProgressBar

MissingSamples = tuple[Contender, Problem, tuple[int, ...]]
"""A contender, a problem, and the numbers of the samples to be generated."""


def generate_completions(
    decoder: Decoder,
    contenders: Sequence[Contender],
    suite: Suite,
    *,
    samples: int,
    log: CompletionLog,
    known: Mapping[Key, LoggedCompletion],
) -> None:
    """Append to the journal what it lacks of `samples` completions of every problem by every contender.

    known: the content of the journal. The model gets a prompt without its trailing white space, as training
    prompts have none; the program contains all of it. Raises UserError if the journal has completions of
    another prompt or by other weights of an adapter.
    """
    rank, processes = world()
    missing = _missing_samples(contenders, suite, samples, log=log, known=known)
    missing.sort(key=lambda item: (-len(item[1].prompt), item[1].language, item[1].name))
    # whole problems are distributed, as contenders differ in the cost of a token, and every process should
    # have all
    problems = list(dict.fromkeys((problem.language, problem.name) for _, problem, _ in missing))
    share_of_problems = set(problems[rank::processes])
    share = [item for item in missing if (item[1].language, item[1].name) in share_of_problems]
    if not share:
        return
    writer, done, tokens = log.writer(rank), 0, 0
    with ProgressBar(f"generate for {suite.name}", sum(len(numbers) for *_, numbers in share)) as progress:

        def report(generated: Generated) -> None:
            nonlocal done, tokens
            writer.append(_entry(share[generated.request], generated))
            done, tokens = done + 1, tokens + generated.tokens
            progress.update(done, {"tok/s": f"{tokens / progress.seconds:.0f}"})

        decoder.run([_request(item) for item in share], report)


def _missing_samples(
    contenders: Sequence[Contender],
    suite: Suite,
    samples: int,
    *,
    log: CompletionLog,
    known: Mapping[Key, LoggedCompletion],
) -> list[MissingSamples]:
    asked = suite.asked
    missing: list[MissingSamples] = []
    for contender in contenders:
        for language in contender.languages:
            for problem in asked.get(language, {}).values():
                numbers = []
                for sample in range(samples):
                    logged = known.get((contender.name, problem.language, problem.name, sample))
                    if logged is None:
                        numbers.append(sample)
                    else:
                        _check_origin(logged, contender, problem, log=log)
                if numbers:
                    missing.append((contender, problem, tuple(numbers)))
    return missing


def _request(missing: MissingSamples) -> Request:
    contender, problem, numbers = missing
    keys = tuple(f"{contender.name}/{problem.language}/{problem.name}/{sample}" for sample in numbers)
    return Request(contender.adapter, problem.prompt.rstrip(), keys, problem.stop_tokens)


def _entry(missing: MissingSamples, generated: Generated) -> LoggedCompletion:
    contender, problem, numbers = missing
    return LoggedCompletion(
        adapter=contender.name,
        language=problem.language,
        name=problem.name,
        sample=numbers[generated.sample],
        completion=generated.text,
        ended=generated.ended,
        tokens=generated.tokens,
        prompt_sha=problem.sha,
        adapter_sha=contender.sha,
    )


def _check_origin(
    logged: LoggedCompletion, contender: Contender, problem: Problem, *, log: CompletionLog
) -> None:
    """Raises UserError for a completion of another version of the problem, or by other weights of the
    adapter."""
    location = f"{log.path}: {'/'.join(map(str, logged.key))}"
    remedy = "choose another folder with --out FOLDER"
    if logged.prompt_sha != problem.sha:
        raise user_error(location, None, f"was generated for another version of this problem: {remedy}")
    if logged.adapter_sha != contender.sha:
        hint = "was generated with other weights of this adapter (was it trained further?)"
        raise user_error(location, None, f"{hint}: {remedy}")
