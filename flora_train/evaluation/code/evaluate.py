"""Evaluates a bank of adapters on programming problems: plan, generate, execute, score. Every stage can be
resumed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.config.errors import Problem as Fault
from flora_train.config.errors import UserError, choices, user_error
from flora_train.config.json_format import JsonObject, JsonValue
from flora_train.config.schema import RunConfig
from flora_train.data.chat.prompts import sample_prompts
from flora_train.evaluation.code.completion_files import Completion
from flora_train.evaluation.code.completion_log import CompletionLog, LoggedCompletion
from flora_train.evaluation.code.contenders import (
    Contender,
    Route,
    check_fit,
    check_peft_contenders,
    contenders_of,
    languages_of,
    learnt_tasks,
    peft_contender,
)
from flora_train.evaluation.code.generate import generate_completions
from flora_train.evaluation.code.problems.suites import Suite, load_suite
from flora_train.evaluation.code.programs.execute import preflight
from flora_train.evaluation.code.programs.languages import Language, find_language, load_languages
from flora_train.evaluation.code.programs.sandbox import open_sandbox
from flora_train.evaluation.code.programs.verdicts import collect_verdicts, have_other_limits, read_verdicts
from flora_train.evaluation.code.score_types import DecidedProblem
from flora_train.evaluation.code.summary import SuiteRecords, read_summary, summarise, write_summary
from flora_train.evaluation.code.wins_and_losses import wins_and_losses
from flora_train.evaluation.generation import Decoder, MergedDecoding, Sampling, check_prompts
from flora_train.evaluation.generation.context_limit import Prompts
from flora_train.models.probe_inputs import count_tokens
from flora_train.runtime.checksum import fingerprint
from flora_train.runtime.distributed import on_main_process, wait_for_everyone
from flora_train.runtime.environment import available_cpus, dtype_of

RESERVED_NAMES = ("", "answers", "heldout", "speech", "report.html", "report.json")
"""Names in a run's folder eval/ that no suite may have, as its results are in a folder of its name."""

Generate = Callable[[nn.Module, Route, Sequence[Contender]], None]
"""Generates the missing completions of contenders on a model."""


@dataclass(frozen=True)
class Plan:
    """What will be evaluated. The main process makes the plan for all."""

    suites: tuple[Suite, ...]
    languages: Mapping[str, Language]
    """Key -> row of the table, for languages that run here."""
    broken: Mapping[str, str]
    """Key -> why a language does not run here."""


def plan_evaluation(config: RunConfig, need_sandbox: bool = True) -> Plan | None:
    """The problems to be solved and the languages that can be executed here; None if the recipe has no
    problems.

    Called before training. Raises UserError for an unknown language or suite, for tasks without a language,
    or if no sandbox works: nothing runs unconfined unless the user requested it. need_sandbox=False: without
    a sandbox no language is evaluated, and the plan says why.
    """
    if not config.evaluation.problems:
        return None
    suites, keys, table = load_suites(config)
    try:
        sandbox = open_sandbox(config.evaluation.sandbox)
    except UserError as error:
        if need_sandbox:
            raise
        return Plan(suites, {}, dict.fromkeys(keys, str(error.problems[0])))
    broken = preflight([table[key] for key in keys], sandbox)
    return Plan(suites, {key: table[key] for key in keys if key not in broken}, broken)


def load_suites(config: RunConfig) -> tuple[tuple[Suite, ...], Sequence[str], Mapping[str, Language]]:
    """The problems to be solved, the keys of their languages, and the table of languages.

    Raises UserError for an unknown language or suite, or a language that no task has.
    """
    task_languages = languages_of(config)
    if not task_languages:
        hint = (
            "no task has a language: give tasks.<name>.language, a key of eval/languages.yaml (lua, pl, "
            "rb, ...)"
        )
        raise user_error("evaluation.problems", config.evaluation.problems, hint)
    table = load_languages(config.evaluation.cpu_seconds)
    _check_languages(config, task_languages, table)
    known = sorted(set(task_languages.values()))
    keys = config.evaluation.languages or known
    if unknown := sorted(set(keys) - set(known)):
        hint = f"no task has this language; tasks have {choices(known)}"
        raise user_error("evaluation.languages", unknown[0], hint)
    sources = config.evaluation.problems
    suites = tuple(load_suite(source, keys, config.evaluation.max_problems) for source in sources)
    names = [suite.name for suite in suites]
    for source, name in zip(sources, names, strict=True):
        if name in RESERVED_NAMES:
            hint = "would have the name of another file or folder in the run's folder eval/: rename it"
            raise user_error("evaluation.problems", source, hint)
    if repeated := [name for name in names if names.count(name) > 1]:
        hint = "two suites would share this name and therefore their folder: rename one"
        raise user_error("evaluation.problems", repeated[0], hint)
    return suites, keys, table


def prompts_of(config: RunConfig, suites: Sequence[Suite], tokenizer: Any) -> dict[str, Prompts]:
    """Configuration key -> the prompts that will be completed after training, as the model gets them.

    Raises UserError for messages that cannot be rendered.
    """
    learnt = learnt_tasks(config)
    prompts: dict[str, Prompts] = {}
    for name, task in config.tasks.items():
        if name in learnt and task.sample_prompts:
            rendered = sample_prompts(task, tokenizer, f"tasks.{name}")
            prompts[f"tasks.{name}.sample_prompts"] = ([prompt.content for prompt in rendered], True)
    problem_prompts = _prompts(suites)
    if problem_prompts:
        prompts["evaluation.problems"] = (problem_prompts, False)
    return prompts


def settings_of(config: RunConfig) -> JsonObject:
    """The settings that completions depend on, as far as the configuration states them."""
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
    *,
    bank: AdapterBank,
    tokenizer: Any,
    folder: Path,
    peft: Sequence[str] = (),
    load_base: Callable[[], nn.Module] | None = None,
    restart: bool = False,
) -> None:
    """Write completions, verdicts and `folder`/<suite>/scores.json (see summary.py).

    peft: further contenders, PEFT adapters from disk or hub, each on its own plain model from `load_base`.
    restart: delete completions or verdicts made with other settings. Without it they raise UserError.
    """
    options = config.evaluation
    languages = list(plan.languages)
    contenders = contenders_of(config, bank, languages)
    names = {contender.name for contender in contenders} | {contender.family for contender in contenders}
    check_peft_contenders(peft, names)
    if peft and load_base is not None:
        check_fit(peft, load_base)
    _check_all_prompts(config, plan, model, tokenizer=tokenizer)
    logs = {suite.name: CompletionLog(folder / suite.name) for suite in plan.suites}
    if languages:
        settings = _all_settings(config, model)
        for log in logs.values():
            on_main_process(partial(_claim, log, settings, plan, config=config, restart=restart))

    merging = MergedDecoding(bank)

    def generate(model: nn.Module, route: Route, contenders: Sequence[Contender]) -> None:
        decoder = Decoder(
            model,
            tokenizer,
            route,
            sampling=Sampling(options.temperature, options.top_p, config.seed),
            max_new_tokens=options.max_new_tokens,
            max_rows=options.batch_rows,
            blocks=bank.blocks,
            merging=merging if model is bank.model else None,
        )
        for suite in plan.suites:
            log = logs[suite.name]
            known = log.read()
            wait_for_everyone()  # every process has read the journal before one of them writes to it
            generate_completions(
                decoder, contenders, suite, samples=options.num_samples, log=log, known=known
            )
            wait_for_everyone()

    generate(model, bank.routed, contenders)
    if peft:
        assert load_base is not None
        for source in peft:
            _generate_with_peft(generate, source, load_base=load_base, languages=languages)
    for suite in plan.suites:
        on_main_process(partial(_execute_and_score, config, plan, suite, bank=bank, log=logs[suite.name]))


def _check_languages(
    config: RunConfig, task_languages: Mapping[str, str], table: Mapping[str, Language]
) -> None:
    """Raises UserError, naming every language that is not in the table."""
    given = [(f"tasks.{task}.language", language) for task, language in task_languages.items()]
    given += [("evaluation.languages", language) for language in config.evaluation.languages or ()]
    faults: list[Fault] = []
    for key, language in given:
        try:
            find_language(language, table)
        except UserError as error:
            faults += [Fault(key, language, problem.hint) for problem in error.problems]
    if faults:
        raise UserError(*faults)


def _prompts(suites: Iterable[Suite], languages: Collection[str] | None = None) -> list[str]:
    """The prompts of suites as the model gets them. languages: only of these."""
    prompts = []
    for suite in suites:
        for language, problems in suite.asked.items():
            if languages is None or language in languages:
                prompts += [problem.prompt.rstrip() for problem in problems.values()]
    return prompts


def _check_all_prompts(config: RunConfig, plan: Plan, model: nn.Module, *, tokenizer: Any) -> None:
    """Check the prompts of all suites before the first completion is generated."""
    prompts = _prompts(plan.suites, plan.languages)
    check_prompts(
        tokenizer,
        {"evaluation.problems": (prompts, False)},
        vocabulary=count_tokens(model),
        model=config.model,
        model_config=model.config,
        max_new_tokens=config.evaluation.max_new_tokens,
    )


def _all_settings(config: RunConfig, model: nn.Module) -> dict[str, Any]:
    """All settings that completions depend on."""
    return {
        **settings_of(config),
        "weights of the base model (SHA-256)": fingerprint(model),
        "dtype": dtype_of(model),
    }


def _claim(
    log: CompletionLog, settings: Mapping[str, JsonValue], plan: Plan, *, config: RunConfig, restart: bool
) -> None:
    """Reserve a suite's folder for completions and verdicts with these settings."""
    log.claim({"problems": log.path.name, **settings}, restart=restart)
    if restart and have_other_limits(log.verdicts, config.evaluation.sandbox, plan.languages):
        log.verdicts.unlink()
    read_verdicts(log.verdicts, config.evaluation.sandbox, plan.languages)


def _generate_with_peft(
    generate: Generate, source: str, *, load_base: Callable[[], nn.Module], languages: Sequence[str]
) -> None:
    """In its own function, so that nothing refers to the base model when the next one is loaded."""
    with peft_contender(source, load_base, languages) as (contender, adapted, route):
        generate(adapted, route, [contender])


def _execute_and_score(
    config: RunConfig, plan: Plan, suite: Suite, *, bank: AdapterBank, log: CompletionLog
) -> None:
    """Execute the completions in the plan's languages, and score all that have verdicts.

    These include verdicts of earlier evaluations in other languages or with further contenders.
    """
    logged = list(log.read().values())
    _execute(config, plan, suite, logged=logged, log=log)
    known = {language: (len(problems), suite.sha(language)) for language, problems in suite.problems.items()}
    summary = read_summary(log.path)
    decided: dict[str, Sequence[DecidedProblem]] = {}
    if summary is not None:
        for part in summary.languages:
            known.setdefault(part.language, (part.available, part.prompts_sha))
            decided[part.language] = part.wins_and_losses
    records = read_verdicts(log.verdicts, config.evaluation.sandbox, plan.languages)
    num_samples = Counter(key[:3] for key in records)
    needed = max(config.evaluation.pass_at_k)
    scored = {}
    for key, record in records.items():
        if key[1] in known and num_samples[key[:3]] >= needed:
            scored[key] = record
    contenders = contenders_of(config, bank, list(known))
    names = {contender.name for contender in contenders}
    for name in dict.fromkeys(key[0] for key in scored):
        if name not in names:
            contenders.append(Contender(name, name, BASE_ID, tuple(known), ""))
    for language, problems in suite.problems.items():
        decided[language] = wins_and_losses(problems, language, contenders, logged=logged, records=scored)
    given = SuiteRecords(
        suite=suite,
        known=known,
        contenders=contenders,
        logged=logged,
        records=scored,
        broken={**plan.broken, **suite.missing},
        decided=decided,
    )
    write_summary(summarise(config, given), log.path)


def _execute(
    config: RunConfig, plan: Plan, suite: Suite, *, logged: Sequence[LoggedCompletion], log: CompletionLog
) -> None:
    completions = []
    for entry in logged:
        problems = suite.problems.get(entry.language, {})
        if entry.language in plan.languages and entry.name in problems:
            problem = problems[entry.name]
            completions.append(Completion(entry.adapter, problem, entry.sample, entry.completion))
    if completions:
        workers = config.evaluation.workers or available_cpus()
        sandbox = open_sandbox(config.evaluation.sandbox)
        collect_verdicts(completions, plan.languages, sandbox, file=log.verdicts, workers=workers)
