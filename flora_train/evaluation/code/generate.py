"""Contenders write completions: those that the log lacks, all mixed in one batch, and shared out to all processes."""

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


def generate_completions(
    decoder: Decoder,
    contenders: Sequence[Contender],
    suite: Suite,
    n: int,
    log: CompletionLog,
    known: Mapping[Key, LoggedCompletion],
) -> None:
    """Append to the log what it lacks of n samples for every contender and problem. known: what it has.

    A prompt is given without its trailing white space, as training examples end theirs; the program has it whole.
    Raises UserError if the log has completions of another prompt or of other numbers of an adapter.
    """
    rank, processes = world()
    asked = suite.asked
    todo: list[tuple[Contender, Problem, tuple[int, ...]]] = []
    for contender in contenders:
        for language in contender.languages:
            for problem in asked.get(language, {}).values():
                missing = tuple(i for i in range(n) if not _is_known(known, contender, problem, i, log))
                if missing:
                    todo.append((contender, problem, missing))
    todo.sort(key=lambda item: (-len(item[1].prompt), item[1].language, item[1].name))
    # whole problems are dealt out: one contender's tokens cost more than another's, and every process shall have some of each
    problems = list(dict.fromkeys((problem.language, problem.name) for _, problem, _ in todo))
    dealt = set(problems[rank::processes])
    mine = [item for item in todo if (item[1].language, item[1].name) in dealt]
    if not mine:
        return
    requests = [
        Request(
            contender.adapter,
            problem.prompt.rstrip(),
            tuple(f"{contender.name}/{problem.language}/{problem.name}/{sample}" for sample in samples),
            problem.stop_tokens,
        )
        for contender, problem, samples in mine
    ]
    writer, done, tokens = log.writer(rank), 0, 0
    with ProgressBar(f"generate for {suite.name}", sum(len(samples) for *_, samples in mine)) as watch:

        def report(generated: Generated) -> None:
            nonlocal done, tokens
            contender, problem, samples = mine[generated.request]
            writer.append(
                LoggedCompletion(
                    contender.name,
                    problem.language,
                    problem.name,
                    samples[generated.sample],
                    generated.text,
                    generated.ended,
                    generated.tokens,
                    problem.sha,
                    contender.sha,
                )
            )
            done, tokens = done + 1, tokens + generated.tokens
            watch.update(done, {"tok/s": f"{tokens / watch.seconds:.0f}"})

        decoder.run(requests, report)


def _is_known(
    known: Mapping[Key, LoggedCompletion], contender: Contender, problem: Problem, sample: int, log: CompletionLog
) -> bool:
    logged = known.get((contender.name, problem.language, problem.name, sample))
    if logged is None:
        return False
    at = f"{log.path}: {'/'.join(map(str, logged.key))}"
    if logged.prompt_sha != problem.sha:
        raise user_error(at, None, "was written for another version of this problem: choose another folder with out=FOLDER")
    if logged.adapter_sha != contender.sha:
        raise user_error(
            at, None, "was written by other numbers of this adapter (trained on?): choose another folder with out=FOLDER"
        )
    return True
