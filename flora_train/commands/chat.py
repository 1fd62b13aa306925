"""flora-train chat: talks to the base and to adapters of a run, side by side in a terminal."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pydantic import Field
from rich.console import Console

from flora_train.adapters.spec import BASE_ID, AdapterSpec, expand
from flora_train.commands.chat_display import make_display
from flora_train.commands.chat_input import COMMANDS, Command, UserInput
from flora_train.commands.chat_prompts import PlainPrompter, Prompter, TemplatePrompter
from flora_train.commands.chat_session import ChatSession, Contender, Settings
from flora_train.config.base import ConfigModel, PathText, Text
from flora_train.config.command_options import read_options
from flora_train.config.errors import UserError, choices, did_you_mean, user_error
from flora_train.config.schema import RunConfig
from flora_train.config.terminal_text import shown
from flora_train.data.chat.encoder import ChatEncoder
from flora_train.data.chat.template import ChatTemplate, shipped_templates
from flora_train.data.text_encoder import TextEncoder
from flora_train.evaluation.generation import Sampling, batching_note
from flora_train.models.loading import load_tokenizer
from flora_train.run_context import RunContext, load_run, locked, note_differences
from flora_train.runtime.run_folder import open_run
from flora_train.training.origin import OriginOptions

FEW_ADAPTERS = 3
"""Up to this number of adapters, all answer if none is named."""
BASE = "base"


class ChatOptions(ConfigModel):
    system: Text | None = None
    """A system prompt."""
    temperature: float = Field(0.7, ge=0, le=100)
    """0 is greedy."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Draw from the smallest set of likeliest tokens with this total probability."""
    max_new_tokens: int = Field(512, ge=1, le=1_000_000)
    """Tokens of an answer."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Of the draws."""
    chat_template: PathText | None = None
    """Instead of the run's and the tokenizer's."""
    plain: bool = False
    """Continue each text as it is, without a template."""


def chat_with_run(
    run: str, adapters: Sequence[str] = (), *, allow_different_base: bool = False, **values: object
) -> None:
    """Read texts from standard input until its end, and show the answers of base and adapters.

    adapters: names of those that answer beside the base; values: ChatOptions. Raises UserError for wrong
    input before the model is loaded.
    """
    folder, config = open_run(run)
    options = read_options(ChatOptions, values)
    specs = {spec.name: spec for spec in expand(config) if spec.writes_text}
    if not specs:
        raise user_error("run", run, "has tasks of labels or embeddings only: their adapters write no text")
    if any(task.speech is not None for task in config.tasks.values()):
        raise user_error("run", run, "has speech tasks: only models of text can be talked to")
    if not folder.adapters.is_dir() or not any(folder.adapters.iterdir()):
        raise user_error("run", run, "has no adapters: it did not finish; resume it with resume=true")
    chosen = _chosen(adapters, specs)
    allow = OriginOptions(allow_different_base=allow_different_base)
    with locked(run, alone=allow_different_base) as folder:
        prompters = _prompters(config, list(specs.values()), options)
        context, _ = load_run(run, allow=allow)
        note_differences(folder, "chat", context.differences)
        session = _session(context, prompters, options)
        session.choose(chosen)
        _Chat(session, run).run()


def _chosen(names: Sequence[str], specs: Mapping[str, AdapterSpec]) -> list[str]:
    """The contenders that answer first. Raises UserError for an unknown adapter."""
    if not names:
        names = list(specs)
        if len(names) > FEW_ADAPTERS:
            names = names[:1]
    known = [BASE, *specs]
    for name in names:
        if name not in known:
            hint = f"the run has no such adapter; there are {choices(specs)}.{did_you_mean(name, known)}"
            raise user_error("adapter", name, hint)
    return list(dict.fromkeys([BASE, *names]))


def _prompters(config: RunConfig, specs: Sequence[AdapterSpec], options: ChatOptions) -> dict[str, Prompter]:
    """Contender -> its prompts: by the template of its task, or by the tokenizer's."""
    tokenizer = load_tokenizer(config.model)
    if options.plain:
        plain_prompter = PlainPrompter(TextEncoder(tokenizer))
        return dict.fromkeys([BASE, *(spec.name for spec in specs)], plain_prompter)
    names = {spec.name: config.tasks[spec.task].chat_template for spec in specs}
    own = getattr(tokenizer, "chat_template", None)
    names = {BASE: None if own else next(filter(None, names.values()), None), **names}
    if options.chat_template is not None:
        names = dict.fromkeys(names, options.chat_template)
    if None in names.values() and not own:
        hint = (
            f"the tokenizer of {config.model.path} has none: give --chat-template NAME (a .jinja file, "
            f"{choices(shipped_templates())}), or --plain to let the model continue each text"
        )
        raise user_error("chat_template", None, hint)
    made: dict[str | None, Prompter] = {}
    for template_name in set(names.values()):
        template = _template(tokenizer, template_name)
        made[template_name] = TemplatePrompter(ChatEncoder(template, tokenizer), options.system)
        made[template_name].prompt([{"role": "user", "content": "Hello"}])  # it may refuse the system prompt
    return {name: made[template_name] for name, template_name in names.items()}


def _template(tokenizer: Any, name: str | None) -> ChatTemplate:
    """The chat template. Raises UserError, whose key is the option's."""
    try:
        return ChatTemplate.of(tokenizer, name, "")
    except UserError as error:
        problems = [replace(problem, key="--chat-template") for problem in error.problems]
        raise UserError(*problems) from None


def _session(context: RunContext, prompters: Mapping[str, Prompter], options: ChatOptions) -> ChatSession:
    """The conversations with all contenders of a run."""
    ids = {BASE: BASE_ID, **{name: context.bank.ids[name] for name in prompters if name != BASE}}
    contenders = {name: Contender(name, ids[name], prompter) for name, prompter in prompters.items()}
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    return ChatSession(
        context.bank,
        context.tokenizer,
        contenders,
        model=context.config.model,
        settings=Settings(sampling, options.max_new_tokens),
    )


class _Chat:
    """Reads and answers until the end of the input."""

    def __init__(self, session: ChatSession, run: str) -> None:
        self.session, self.run_name = session, run
        self.input = UserInput()
        self.console = Console(soft_wrap=True, highlight=False)

    def run(self) -> None:
        self._print(f"{self.run_name}: {self._who()}. /help lists commands, Ctrl-D leaves")
        if (note := batching_note(self.session.bank.model)) is not None:
            self._print(note)
        with _interruptible(self.input.interactive):
            while True:
                try:
                    said = self.input.read()
                    if said is None or said == Command("quit", ()):
                        return
                    self._answer(said)
                except UserError as error:
                    for problem in error.problems:
                        self._print(f"error: {problem}", "red")
                except KeyboardInterrupt:
                    if not self.input.interactive:
                        raise
                    self._print("\nCtrl-D or /quit leaves")

    def _answer(self, said: str | Command) -> None:
        if isinstance(said, Command):
            self._obey(said)
            return
        display = make_display(self.console, self.session.chosen)
        for note in self.session.say(said, display, stoppable=self.input.interactive):
            self._print(f"({note})")

    def _obey(self, command: Command) -> None:
        if command.name == "help":
            for form, meaning in COMMANDS.items():
                self._print(f"{form:18} {meaning}")
            self._print('"""                begins and ends a text of several lines')
        elif command.name == "reset":
            self.session.reset()
            self._print("all conversations begin anew")
        elif command.arguments:
            self._switch(command.arguments)
        else:
            for name in self.session.contenders:
                self._print(f"{'*' if name in self.session.chosen else ' '} {name}")

    def _switch(self, names: Sequence[str]) -> None:
        """Let other adapters answer. Raises UserError for an unknown one."""
        known = list(self.session.contenders)
        for name in names:
            if name not in known:
                hint = f"the run has no such adapter; there are {choices(known)}.{did_you_mean(name, known)}"
                raise user_error("/adapter", name, hint)
        self.session.choose(list(dict.fromkeys([BASE, *names])))
        self._print(self._who())

    def _who(self) -> str:
        """Who answers, as a sentence without an end."""
        *names, last = self.session.chosen
        others = len(self.session.contenders) - len(self.session.chosen)
        more = f" ({others} more: /adapter lists them)" if others else ""
        if not names:
            return f"{last} answers{more}"
        return f"{', '.join(names)} and {last} answer{more}"

    def _print(self, line: str, style: str = "dim") -> None:
        self.console.print(shown(line, style))


@contextmanager
def _interruptible(interactive: bool) -> Iterator[None]:
    """A context in which every Ctrl-C at a terminal raises KeyboardInterrupt; elsewhere, a second one ends
    the process."""
    if not interactive:
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
