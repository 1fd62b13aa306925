"""From a bank of adapters to pass@k: plan, generate, execute, score. Every stage takes up where it was killed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.config.errors import Problem as Fault
from flora_train.config.errors import UserError, choices, user_error
from flora_train.config.schema import RunConfig
from flora_train.evaluation.code.completion_files import Completion
from flora_train.evaluation.code.completion_log import CompletionLog
from flora_train.evaluation.code.contenders import (
    Contender,
    Route,
    check_fit,
    check_peft_contenders,
    contenders_of,
    languages_of,
    peft_contender,
)
from flora_train.evaluation.code.generate import generate_completions
from flora_train.evaluation.code.problems.suites import Suite, load_suite
from flora_train.evaluation.code.programs.execute import preflight
from flora_train.evaluation.code.programs.languages import Language, find_language, load_languages
from flora_train.evaluation.code.programs.sandbox import open_sandbox
from flora_train.evaluation.code.programs.verdicts import collect_verdicts, read_verdicts
from flora_train.evaluation.code.score_types import DecidedProblem
from flora_train.evaluation.code.summary import read_summary, summarise, write_summary
from flora_train.evaluation.code.wins_and_losses import wins_and_losses
from flora_train.evaluation.generation import Decoder, Sampling, check_prompts
from flora_train.evaluation.generation.context_limit import Prompts
from flora_train.models.probe_inputs import count_tokens
from flora_train.runtime.checksum import fingerprint
from flora_train.runtime.distributed import on_main_process, wait_for_everyone
from flora_train.runtime.environment import available_cpus, dtype_of

FILES_OF_EVAL = ("", "heldout", "speech", "report.html", "report.json")
"""What stands in a run's folder eval/ beside the folders of suites, which are called by the suites' names."""


@dataclass(frozen=True)
class Plan:
    """languages: key -> row of the table, of those that run here; broken: key -> why one does not. The main process makes it
    for all."""

    suites: tuple[Suite, ...]
    languages: Mapping[str, Language]
    broken: Mapping[str, str]


def plan_evaluation(config: RunConfig, need_sandbox: bool = True) -> Plan | None:
    """What will be solved, and whether it can be executed here; None if the recipe has no problems. Called before training.

    Raises UserError for an unknown language or suite, for tasks without a language, or if no sandbox works: nothing runs
    unconfined unless it was asked for. need_sandbox=False: without one, no language is evaluated, and the plan says why.
    """
    if not config.evaluation.problems:
        return None
    suites, wanted, table = load_suites(config)
    try:
        sandbox = open_sandbox(config.evaluation.sandbox)
    except UserError as error:
        if need_sandbox:
            raise
        return Plan(suites, {}, dict.fromkeys(wanted, str(error.problems[0])))
    broken = preflight([table[key] for key in wanted], sandbox)
    return Plan(suites, {key: table[key] for key in wanted if key not in broken}, broken)


def load_suites(config: RunConfig) -> tuple[tuple[Suite, ...], Sequence[str], Mapping[str, Language]]:
    """The problems that will be solved, their languages, and the table of languages. Raises UserError for an unknown language or
    suite, or a language of no task."""
    spoken = languages_of(config)
    if not spoken:
        hint = "no task says its language: give tasks.<name>.language, a key of eval/languages.yaml (lua, pl, rb, ...)"
        raise user_error("evaluation.problems", config.evaluation.problems, hint)
    table = load_languages(config.evaluation.cpu_seconds)
    faults: list[Fault] = []
    for key, language in [(f"tasks.{task}.language", language) for task, language in spoken.items()] + [
        ("evaluation.languages", language) for language in config.evaluation.languages or ()
    ]:
        try:
            find_language(language, table)
        except UserError as error:
            faults += [Fault(key, language, problem.hint) for problem in error.problems]
    if faults:
        raise UserError(*faults)
    wanted = config.evaluation.languages or sorted(set(spoken.values()))
    if absent := sorted(set(wanted) - set(spoken.values())):
        raise user_error(
            "evaluation.languages", absent[0], f"no task is in it; tasks are in {choices(sorted(set(spoken.values())))}"
        )
    suites = tuple(load_suite(source, wanted, config.evaluation.max_problems) for source in config.evaluation.problems)
    names = [suite.name for suite in suites]
    if taken := [source for source, name in zip(config.evaluation.problems, names, strict=True) if name in FILES_OF_EVAL]:
        raise user_error(
            "evaluation.problems", taken[0], "would have the name of something else in the run's folder eval/: rename it"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise user_error("evaluation.problems", twice[0], "two suites would share this name, and their folder: rename one")
    return suites, wanted, table


def prompts_of(config: RunConfig, suites: Sequence[Suite]) -> dict[str, Prompts]:
    """Configuration key -> the prompts that will be completed after training, as they are given to the model."""
    learnt = {
        name: task
        for name, task in config.tasks.items()
        if any(name in (a.tasks or config.tasks) for a in config.adapters.values())
    }
    found: dict[str, Prompts] = {f"tasks.{name}.sample_prompts": (task.sample_prompts, True) for name, task in learnt.items()}
    problems = [problem.prompt.rstrip() for suite in suites for part in suite.asked.values() for problem in part.values()]
    found["evaluation.problems"] = (problems, False)
    return {key: prompts for key, prompts in found.items() if prompts[0]}


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What completions are made with, as far as the configuration says it."""
    options = config.evaluation
    return {
        "model": config.model.path,
        "quantization": config.model.quantization,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_new_tokens": options.max_new_tokens,
        "seed": config.seed,
        "prompt": "without its trailing white space",
    }


def evaluate_code(
    config: RunConfig,
    plan: Plan,
    model: nn.Module,
    bank: AdapterBank,
    tokenizer: Any,
    folder: Path,
    peft: Sequence[str] = (),
    load_base: Callable[[], nn.Module] | None = None,
) -> None:
    """Leaves `folder`/<suite>/scores.json (see summary.py) beside completions and verdicts.

    peft: further contenders, PEFT adapters from disk or hub, each on a plain model of its own that `load_base` makes.
    """
    options = config.evaluation
    sampling = Sampling(options.temperature, options.top_p, config.seed)
    languages = list(plan.languages)
    contenders = contenders_of(config, bank, languages)
    check_peft_contenders(peft, [word for contender in contenders for word in (contender.name, contender.family)])
    if peft and load_base is not None:
        check_fit(peft, load_base)
    asked = [
        problem.prompt.rstrip() for suite in plan.suites for key in languages for problem in suite.asked.get(key, {}).values()
    ]
    # the prompts of all suites, before the first completion is generated
    check_prompts(
        tokenizer,
        {"evaluation.problems": (asked, False)},
        vocabulary=count_tokens(model),
        model=config.model,
        model_config=model.config,
        max_new_tokens=options.max_new_tokens,
    )
    logs = {suite.name: CompletionLog(folder / suite.name) for suite in plan.suites}
    settings = {
        **settings_of(config),
        "weights of the base model (SHA-256)": fingerprint(model),
        "dtype": dtype_of(model),
    }
    for name, log in logs.items() if languages else ():
        on_main_process(partial(log.claim, {"problems": name, **settings}))
        on_main_process(partial(read_verdicts, log.verdicts, options.sandbox, plan.languages))

    def write(model: nn.Module, route: Route, writers: Sequence[Contender]) -> None:
        decoder = Decoder(
            model,
            tokenizer,
            route,
            sampling=sampling,
            max_new_tokens=options.max_new_tokens,
            max_rows=options.batch_rows,
            blocks=bank.blocks,
        )
        for suite in plan.suites:
            log = logs[suite.name]
            known = log.read()
            wait_for_everyone()  # all have read before one writes
            generate_completions(decoder, writers, suite, options.num_samples, log, known)
            wait_for_everyone()

    write(model, bank.routed, contenders)
    if peft:
        assert load_base is not None
        for source in peft:
            _write_alone(write, source, load_base, languages)
    for suite in plan.suites:
        on_main_process(partial(_execute_and_score, config, plan, suite, bank, logs[suite.name]))


def _write_alone(
    write: Callable[[nn.Module, Route, Sequence[Contender]], None],
    source: str,
    load_base: Callable[[], nn.Module],
    languages: Sequence[str],
) -> None:
    """In a function of its own, so that nothing refers to the base model when the next one is loaded."""
    with peft_contender(source, load_base, languages) as (contender, adapted, route):
        write(adapted, route, [contender])


def _execute_and_score(config: RunConfig, plan: Plan, suite: Suite, bank: AdapterBank, log: CompletionLog) -> None:
    """Execute what the log has in the plan's languages, and score all that it has verdicts on, also of earlier calls in other
    languages or with further contenders."""
    logged = list(log.read().values())
    completions = [
        Completion(entry.adapter, suite.problems[entry.language][entry.name], entry.sample, entry.completion)
        for entry in logged
        if entry.language in plan.languages and entry.name in suite.problems.get(entry.language, {})
    ]
    if completions:
        workers = config.evaluation.workers or available_cpus()
        sandbox = open_sandbox(config.evaluation.sandbox)
        collect_verdicts(completions, plan.languages, sandbox, file=log.verdicts, workers=workers)
    known = {language: (len(problems), suite.sha(language)) for language, problems in suite.problems.items()}
    summary = read_summary(log.path)
    earlier = {part.language: part for part in summary.languages} if summary is not None else {}
    for language, part in earlier.items():
        known.setdefault(language, (part.available, part.prompts_sha))
    records = read_verdicts(log.verdicts, config.evaluation.sandbox, plan.languages)
    samples = Counter(key[:3] for key in records)
    scored = {
        key: record for key, record in records.items() if key[1] in known and samples[key[:3]] >= max(config.evaluation.pass_at_k)
    }
    contenders = contenders_of(config, bank, list(known))
    others = dict.fromkeys(key[0] for key in scored if key[0] not in {contender.name for contender in contenders})
    contenders += [Contender(name, name, BASE_ID, tuple(known), "") for name in others]
    broken = {**plan.broken, **suite.missing}
    decided: dict[str, Sequence[DecidedProblem]] = {language: part.wins_and_losses for language, part in earlier.items()}
    for language, problems in suite.problems.items():
        decided[language] = wins_and_losses(problems, language, contenders, logged, scored)
    write_summary(summarise(config, suite, known, contenders, logged, scored, broken, decided), log.path)
