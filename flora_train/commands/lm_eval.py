"""flora-train lm-eval: evaluates the base and the adapters of a run on tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from flora_train import __version__
from flora_train.adapters.spec import BASE_ID, expand
from flora_train.config.base import ConfigModel, PathText, Text
from flora_train.config.command_options import read_options
from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.config.model_schema import ModelConfig
from flora_train.config.schema import RunConfig
from flora_train.config.terminal_text import print_plain, print_table
from flora_train.evaluation.harness.comparison import side_by_side
from flora_train.evaluation.harness.package import check_installed
from flora_train.evaluation.harness.requests import ContenderResults
from flora_train.models.loading import load_auto_tokenizer, load_model_config, tokenizer_in_code
from flora_train.run_context import RunContext, load_run, locked, note_differences
from flora_train.runtime.atomic import check_writable, write_atomically
from flora_train.runtime.distributed import world
from flora_train.runtime.run_folder import RunFolder, open_run
from flora_train.training.origin import OriginOptions

logger = logging.getLogger(__name__)

BASE = "base"


class LmEvalOptions(ConfigModel):
    tasks: Annotated[list[Text], Field(min_length=1)]
    """Names of tasks, groups or tags of lm_eval, patterns such as `mmlu_*`, or YAML files."""
    include_path: PathText | None = None
    """A folder with the YAML files of further tasks."""
    num_fewshot: int | None = Field(None, ge=0, le=10_000)
    """Examples in the prompt. Default: those of each task."""
    limit: float | None = Field(None, gt=0, le=1e12)
    """Documents of each task: their number, or below 1 their share. For trials only."""
    apply_chat_template: bool = False
    """Write prompts with the tokenizer's chat template."""
    output: PathText | None = None
    """A JSON file with lm_eval's results of every contender."""


@dataclass(frozen=True)
class HarnessResults:
    """What one call computed."""

    results: Mapping[str, ContenderResults]
    """Of each contender."""
    num_requests: int
    dtype: str
    """Of the base."""


def lm_eval_run(
    run: str, adapters: Sequence[str] = (), *, allow_different_base: bool = False, **values: object
) -> None:
    """Evaluate the base and adapters of a run (default: all) on tasks of lm_eval, and print its tables.

    values: LmEvalOptions. Raises UserError for wrong input before the model is loaded.
    """
    folder, config = open_run(run)
    options = read_options(LmEvalOptions, values)
    check_installed()
    chosen = _chosen(config, adapters)
    if options.output is not None:
        _check_output(Path(options.output))
    _check_text(run, config)
    if not folder.adapters.is_dir() or not any(folder.adapters.iterdir()):
        raise user_error("run", run, "has no adapters: it did not finish; resume it with resume=true")
    allow = OriginOptions(allow_different_base=allow_different_base)
    with locked(run, alone=allow_different_base) as folder:
        if world()[1] > 1:
            hint = "lm-eval runs in one process: start it without accelerate launch"
            raise user_error("num_processes", world()[1], hint)
        evaluated, differences = _evaluate(run, config, chosen, options, allow=allow)
        note_differences(folder, "lm-eval", differences)
    _print_results(evaluated)
    if options.output is not None:
        _write_results(Path(options.output), folder, config, evaluated)


def _chosen(config: RunConfig, names: Sequence[str]) -> list[str]:
    """The adapters of these names, or all that write text. Raises UserError for an unknown name."""
    known = [spec.name for spec in expand(config) if spec.writes_text]
    if not known:
        hint = "has tasks of labels or embeddings only: lm-evaluation-harness evaluates language models"
        raise user_error("run", config.folder, hint)
    for name in names:
        if name not in known:
            hint = f"the run has no such adapter; there are {choices(known)}.{did_you_mean(name, known)}"
            raise user_error("adapter", name, hint)
    return list(dict.fromkeys(names)) or known


def _check_output(path: Path) -> None:
    """Raises UserError if the file cannot be written."""
    if path.is_dir():
        raise user_error("--output", str(path), "is a folder: give the name of a file, such as results.json")
    check_writable(path.parent)


def _check_text(run: str, config: RunConfig) -> None:
    """Raises UserError for a run whose base is not a causal language model."""
    if any(task.speech is not None for task in config.tasks.values()):
        raise user_error("run", run, "has speech tasks: lm-evaluation-harness evaluates models of text")
    if getattr(load_model_config(config.model), "is_encoder_decoder", False):
        hint = "is an encoder-decoder: lm-eval evaluates causal language models"
        raise user_error("model.path", config.model.path, hint)


def _evaluate(
    run: str, config: RunConfig, adapters: Sequence[str], options: LmEvalOptions, *, allow: OriginOptions
) -> tuple[HarnessResults, Sequence[str]]:
    """The results, and the allowed differences to the run's training. Tasks come first, then the model."""
    from flora_train.evaluation.harness.evaluation import BatchLimits, MixedEvaluation
    from flora_train.evaluation.harness.model import PromptModel
    from flora_train.evaluation.harness.tasks import HarnessTasks, TaskOptions

    tokenizer = _load_tokenizer(config.model, options)
    prompts = PromptModel(tokenizer, load_model_config(config.model))
    tasks = HarnessTasks(
        TaskOptions(
            names=tuple(options.tasks),
            include_path=options.include_path,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
        ),
        base=config.model.path,
    )
    requests = tasks.requests(prompts)
    num_requests = sum(map(len, requests.values()))
    logger.info(f"lm-eval: {num_requests:,} requests to the base and {len(adapters):,} adapters")
    context, _ = load_run(run, allow=allow)
    _check_head(context)
    contenders = {BASE: BASE_ID, **{name: context.bank.ids[name] for name in adapters}}
    limits = BatchLimits(
        # no activations are kept for a backward
        max_tokens=2 * context.config.training.tokens_per_microbatch,
        max_rows=context.config.evaluation.batch_rows,
    )
    evaluation = MixedEvaluation(context.bank, prompts, contenders, limits)
    results = evaluation.results(tasks, requests)
    dtype = str(next(context.model.parameters()).dtype).removeprefix("torch.")
    return HarnessResults(results, num_requests, dtype), context.differences


def _load_tokenizer(config: ModelConfig, options: LmEvalOptions) -> Any:
    """The tokenizer that lm_eval's `hf` model loads. Raises UserError if a chat template is asked for and it
    has none."""
    tokenizer = load_auto_tokenizer(config)
    if tokenizer_in_code(config) != ("AutoTokenizer", ""):
        logger.warning(
            f"lm_eval reads texts with transformers' AutoTokenizer, which differs from the tokenizer that "
            f"{config.path} publishes and that the adapters were trained with"
        )
    if options.apply_chat_template and not getattr(tokenizer, "chat_template", None):
        hint = f"the tokenizer of {config.path} has no chat template: leave it out"
        raise user_error("--apply-chat-template", None, hint)
    return tokenizer


def _check_head(context: RunContext) -> None:
    """Raises UserError for a model that predicts no tokens."""
    if context.model.get_output_embeddings() is None:  # type: ignore[operator]
        hint = "predicts no next tokens: lm-eval evaluates causal language models"
        raise user_error("model.path", context.config.model.path, hint)


def _print_results(evaluated: HarnessResults) -> None:
    """lm_eval's own tables of every contender, and all values side by side."""
    for name, results in evaluated.results.items():
        print_plain(f"{name} (base in {evaluated.dtype})", *results.tables)
    if len(evaluated.results) > 1:
        print_table(side_by_side(evaluated.results))


def _write_results(path: Path, folder: RunFolder, config: RunConfig, evaluated: HarnessResults) -> None:
    """Write lm_eval's results of every contender as JSON."""
    content = {
        "run": str(folder.path),
        "base": config.model.path,
        "base_dtype": evaluated.dtype,
        "requests": evaluated.num_requests,
        "versions": {"flora_train": __version__, "lm_eval": version("lm_eval")},
        "contenders": {name: json.loads(results.text) for name, results in evaluated.results.items()},
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print_plain(f"results   {path}")
