"""The final evaluation of a run: losses, programs, transcripts, samples; then exports, report and cards."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from types import MappingProxyType

from pydantic import ValidationError

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.config.errors import first_line, user_error
from flora_train.config.sample_prompts import SamplePrompt
from flora_train.data.chat.prompts import Prompt, sample_prompts
from flora_train.data.hub_commits import commits_of
from flora_train.data.labels.choices import ChoiceSplit
from flora_train.evaluation.answers.figures import answer_figures
from flora_train.evaluation.answers.generate import generate_answers
from flora_train.evaluation.answers.journal import AnswerLog
from flora_train.evaluation.answers.prompts import AnsweredTask, answered_tasks
from flora_train.evaluation.code.evaluate import Plan, evaluate_code
from flora_train.evaluation.code.summary import read_summaries
from flora_train.evaluation.embeddings.figures import embedding_figures
from flora_train.evaluation.figures.choices import choice_figures
from flora_train.evaluation.figures.prediction_files import write_predictions
from flora_train.evaluation.generation import complete
from flora_train.evaluation.heldout_journal import HeldoutJournal
from flora_train.evaluation.report.files import write_report
from flora_train.evaluation.report.results import Evaluation, build_results
from flora_train.evaluation.report.types import DialogueMessage, JointSpeedup, RunFacts, SampleCompletion
from flora_train.evaluation.routing.load_types import ExpertLoad
from flora_train.evaluation.routing.loads import expert_loads
from flora_train.evaluation.speech.evaluate import evaluate_speech
from flora_train.evaluation.speech.summary import read_summary
from flora_train.export.model_card import write_card
from flora_train.export.peft_format import base_of
from flora_train.export.peft_import import init_from_peft
from flora_train.export.routed_format import export_adapter
from flora_train.export.sentence_transformers import write_embedding_files
from flora_train.export.usage_snippet import generation_example
from flora_train.run_context import RunContext
from flora_train.runtime.checksum import fingerprint
from flora_train.runtime.distributed import on_main_process, world
from flora_train.runtime.environment import count_parameters, dtype_of, environment, now, peak_memory
from flora_train.runtime.manifest import PEFT_WARNING
from flora_train.runtime.progress import ProgressBar
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.best_adapters import BestCheckpoint
from flora_train.training.choice_scores import ChoiceScores, score_choices
from flora_train.training.fsdp import unshard
from flora_train.training.heldout import HeldOut, evaluate_heldout
from flora_train.training.joint_speedup import JointSpeedup as MeasuredSpeedup
from flora_train.training.label_loss import LabelLosses
from flora_train.training.loss import RowLosses
from flora_train.training.references import prepare_references


def run_final_evaluation(
    context: RunContext, best: Mapping[int, BestCheckpoint], plan: Plan | None = None, *, publish: bool = True
) -> None:
    """Evaluate base and adapters on all held-out examples, on programs and on clips, and write report and
    adapters.

    best: adapter id -> its best checkpoint, which the bank holds; publish: also export the adapters and write
    the results on their cards.
    """
    config, folder = context.config, context.folder
    started = time.monotonic()
    hashes = {name: task.data_hash for name, task in context.tasks.items()}
    log = HeldoutJournal(folder.evaluation / "heldout", context.bank, hashes)
    prepare_references(
        context,
        base_hash=lambda: context.base_hash or fingerprint(context.model),
        init_adapters=partial(init_from_peft, context.bank),
    )
    answered = answered_tasks(config, context.tasks, context.model, context.tokenizer)
    heldout = heldout_losses(context, context.bank, log=log)
    choices = choice_scores(context, context.bank, log=log.part("words"))
    experts = heldout_expert_loads(context)
    if publish:
        on_main_process(lambda: export_all(context))
    seconds = {"evaluate at the end": time.monotonic() - started}
    if plan is not None or answered or any(task.sample_prompts for task in config.tasks.values()):
        unshard(context.model)
    if answered:
        started = time.monotonic()
        generate_answers(
            config,
            answered,
            context.model,
            bank=context.bank,
            tokenizer=context.tokenizer,
            folder=folder.evaluation,
        )
        seconds["answer prompts"] = time.monotonic() - started
    if plan is not None:
        started = time.monotonic()
        evaluate_code(
            config,
            plan,
            context.model,
            bank=context.bank,
            tokenizer=context.tokenizer,
            folder=folder.evaluation,
            restart=not publish,
        )
        seconds["solve problems"] = time.monotonic() - started
    if context.speech_processor is not None:
        started = time.monotonic()
        evaluate_speech(
            config,
            context.tasks,
            context.model,
            bank=context.bank,
            speech_processor=context.speech_processor,
            folder=folder.evaluation,
            restart=not publish,
        )
        context.close()
        seconds["transcribe"] = time.monotonic() - started
    on_main_process(
        lambda: write_results(
            context,
            best,
            heldout,
            answered,
            choices=choices,
            experts=experts,
            seconds=seconds,
            publish=publish,
        )
    )
    on_main_process(log.delete)


def heldout_losses(
    context: RunContext, bank: AdapterBank, *, absent: Sequence[int] = (), log: HeldoutJournal | None = None
) -> dict[str, HeldOut]:
    """Losses of the base and of the bank's adapters on every held-out example.

    absent: ids of adapters that are not evaluated; log: where results are kept until all are there.
    """
    with ProgressBar("evaluate", 1.0) as progress:
        return evaluate_heldout(
            RowLosses(bank.model, labels=LabelLosses(bank, context.tasks)),
            bank,
            context.tasks.values(),
            max_tokens=2 * context.config.training.tokens_per_microbatch,
            pad_token=context.pad_token,
            with_base=True,
            with_test=True,
            report=progress.update,
            collate=context.collate,
            absent=absent,
            log=log,
            references=context.references,
        )


def choice_scores(
    context: RunContext, bank: AdapterBank, *, absent: Sequence[int] = (), log: HeldoutJournal | None = None
) -> dict[str, ChoiceScores]:
    """Scores of the words of labels, of the base and of the bank's adapters.

    absent: ids of adapters that are not evaluated; log: where scores are kept until all are there.
    """
    if not any(isinstance(task.evaluated, ChoiceSplit) for task in context.tasks.values()):
        return {}
    with ProgressBar("score the words of labels", 1.0) as progress:
        return score_choices(
            RowLosses(bank.model),
            bank,
            context.tasks,
            max_tokens=2 * context.config.training.tokens_per_microbatch,
            pad_token=context.pad_token,
            collate=context.collate,
            absent=absent,
            report=progress.update,
            log=log,
        )


def heldout_expert_loads(context: RunContext) -> list[ExpertLoad]:
    """The load of the experts of routed adapters on held-out texts. Collective."""
    return expert_loads(
        RowLosses(context.bank.model, labels=LabelLosses(context.bank, context.tasks)),
        context.bank,
        context.tasks,
        max_tokens=2 * context.config.training.tokens_per_microbatch,
        pad_token=context.pad_token,
        collate=context.collate,
    )


def export_all(context: RunContext) -> None:
    """Write a PEFT folder of each adapter, or several of a routed one."""
    base = base_of(context)
    for name in context.bank.ids:
        folder = export_adapter(context.bank, name, context.folder.adapters / name, base=base)
        if not context.bank.specs[context.bank.ids[name]].is_routed:
            write_embedding_files(context, name, folder)


def write_results(
    context: RunContext,
    best: Mapping[int, BestCheckpoint],
    heldout: Mapping[str, HeldOut],
    answered: Sequence[AnsweredTask] = (),
    *,
    choices: Mapping[str, ChoiceScores] = MappingProxyType({}),
    experts: Sequence[ExpertLoad] = (),
    seconds: Mapping[str, float],
    publish: bool,
) -> None:
    """Write sample completions, report and model cards. answered: tasks whose answers are in the journal;
    choices: task -> scores of the words of its labels; experts: the loads of routed adapters; seconds: stage
    of the evaluation -> its time."""
    config, bank, folder = context.config, context.bank, context.folder
    started = time.monotonic()
    completions = sample_completions(context)
    facts = recorded_facts(folder) or training_facts(context, {})
    stages = {**facts.seconds, **seconds}
    stages["evaluate at the end"] += time.monotonic() - started
    facts = facts.replace(
        seconds=stages,
        config=folder.config.read_text(encoding="utf-8"),
        origin_differences=context.differences,
        not_for_plain_peft=_peft_warnings(context),
    )
    code, speech = read_summaries(folder.evaluation), read_summary(folder.evaluation)
    answers = {}
    if answered:
        answers = AnswerLog(folder.evaluation).read()
    write_predictions(folder.evaluation, bank, heldout)
    figures = answer_figures(config, bank, heldout, answered, answers, loaded=context.tasks)
    for name, scores in choices.items():
        of_words = choice_figures(config, bank, context.tasks[name], scores)
        figures.results += of_words.figures
        figures.confusions += of_words.confusions
        figures.notes += of_words.notes
    of_embeddings = embedding_figures(config, bank, heldout)
    evaluation = Evaluation(
        heldout,
        best,
        completions,
        code,
        speech,
        [*figures.results, *of_embeddings],
        figures.confusions,
        experts,
        figures.notes,
    )
    report = build_results(config, folder, context.tasks, bank, evaluation=evaluation, facts=facts)
    write_report(report, folder.evaluation)
    if publish:
        for spec in bank.specs:
            write_card(
                report, spec, folder.adapters / spec.name, example=generation_example(config, spec.task)
            )


def _peft_warnings(context: RunContext) -> dict[str, str]:
    """Adapter -> text of the file that says why plain PEFT does not load its folder."""
    warnings = {}
    for name in context.bank.ids:
        file = context.folder.adapters / name / PEFT_WARNING
        if file.exists():
            warnings[name] = file.read_text(encoding="utf-8").strip()
    return warnings


def sample_completions(context: RunContext) -> list[SampleCompletion]:
    """Every task's sample prompts, continued by the base model and by the task's adapters in one batch."""
    requests: list[tuple[str | Prompt, int]] = []
    prompts: list[tuple[str, SamplePrompt, list[str]]] = []
    for name, task in context.config.tasks.items():
        specs = [spec for spec in context.bank.specs if spec.task == name]
        if specs:
            families = ["base", *(spec.family for spec in specs)]
            ids = [BASE_ID, *(context.bank.ids[spec.name] for spec in specs)]
            rendered = sample_prompts(task, context.tokenizer, f"tasks.{name}")
            for written, prompt in zip(task.sample_prompts, rendered, strict=True):
                prompts.append((name, written, families))
                requests += [(prompt, adapter) for adapter in ids]
    if not requests:
        return []
    max_new_tokens = context.config.evaluation.max_new_tokens
    texts = iter(
        complete(
            context.model, context.bank, context.tokenizer, requests=requests, max_new_tokens=max_new_tokens
        )
    )
    samples = []
    for name, written, families in prompts:
        completions = {family: next(texts) for family in families}
        samples.append(SampleCompletion(task=name, prompt=_reported(written), completions=completions))
    return samples


def _reported(prompt: SamplePrompt) -> str | tuple[DialogueMessage, ...]:
    """A prompt as the report has it."""
    if isinstance(prompt, str):
        return prompt
    messages = []
    for message in prompt:
        content = message.get("content") or json.dumps(message.get("tool_calls"), ensure_ascii=False)
        messages.append(DialogueMessage(role=message["role"], content=content))
    return tuple(messages)


def training_facts(context: RunContext, seconds: Mapping[str, float]) -> RunFacts:
    """Where, with what and at what cost a run was trained. seconds: stage -> its time."""
    return RunFacts(
        **dict(environment()),
        model=context.config.model.path,
        base_parameters=count_parameters(context.model),
        dtype=dtype_of(context.model),
        device=str(context.bank.device),
        processes=world()[1],
        peak_memory_bytes=peak_memory(context.bank.device),
        finished=now(),
        seconds=dict(seconds),
        hub_commits=commits_of(context.config),
    )


def recorded_facts(folder: RunFolder) -> RunFacts | None:
    """The facts of training in run.json, so that a later evaluation reports these and not its own; None if
    there are none. Raises UserError if they are damaged."""
    recorded = folder.facts().training.model_dump(exclude_unset=True)
    if not recorded:
        return None
    try:
        known = {key: value for key, value in recorded.items() if key in RunFacts.model_fields}
        return RunFacts.model_validate(known)
    except (ValidationError, ValueError, TypeError) as error:
        hint = f"is damaged (training: {first_line(error)}): restore it from a copy"
        raise user_error(str(folder.run_json), None, hint) from error


def reported_speedup(measured: MeasuredSpeedup | None) -> JointSpeedup | None:
    """A measurement of `time_joint_vs_separate`, as the report holds it."""
    if measured is None:
        return None
    return JointSpeedup(**asdict(measured))
