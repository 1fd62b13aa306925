"""The typer application: registration of commands, and errors of its parser in one line each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from flora_train import __version__
from flora_train.cli.suggestions import LONG_OPTION, Keys, option_for_assignment, unknown_option
from flora_train.config.errors import Problem, UserError, choices, did_you_mean

PROGRAM = "flora-train"
COMPLETION = "_FLORA_TRAIN_COMPLETE"
"""The variable that a shell sets to request completions."""
COMMANDS = (
    "train",
    "init",
    "doctor",
    "data",
    "plan",
    "recipes",
    "evaluate",
    "lm-eval",
    "chat",
    "serve",
    "report",
    "solve",
    "execute",
    "export",
    "convert",
    "push",
)
"""In the order of the help. Each is in a module of this package with the same name, with _ instead of -."""
HELP = ("-h", "--help")

ParserError: Any = typer.BadParameter.__mro__[1]
"""Base of what typer's parser raises; where it is defined differs between versions of typer."""

Function = TypeVar("Function", bound=Callable[..., None])


class Command(TyperCommand):
    """A command with its usage as written here, and with suggestions for options of another form."""

    usage = ""
    takes_overrides = False
    takes_recipe = False

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [self.usage]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for param in self.params:  # newer versions of typer print the Python type behind an argument's name
            if param.param_type_name == "argument" and hasattr(param, "display_type_rich"):
                param.display_type_rich = _no_type
        super().format_options(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises UserError with every argument that is not of a form that this command takes."""
        if ctx.resilient_parsing:  # a shell requests completions
            return super().parse_args(ctx, args)
        if set(HELP) & set(args):
            _print_help(ctx)
        if problems := list(self._problems(args)):
            raise UserError(*problems)
        return super().parse_args(ctx, args)

    def _options(self) -> dict[str, Any]:
        """Option, such as `--out`, -> its parameter."""
        options = {}
        for param in self.params:
            options.update(dict.fromkeys((name for name in param.opts if name.startswith("-")), param))
        return options

    def _keys(self) -> Keys:
        """The keys of recipes that this command takes."""
        if self.takes_recipe:
            return "all"
        return "results" if self.takes_overrides else "none"

    def _problems(self, args: Sequence[str]) -> Iterator[Problem]:
        options = self._options()
        free_form = self.context_settings.get("ignore_unknown_options", False)
        value_of = ""
        for arg in args:
            if arg == "--":
                return
            if not _is_utf8(arg):
                yield Problem(arg.encode(errors="replace").decode(), None, "is not valid UTF-8 text")
                continue
            name, equals, _ = arg.partition("=")
            if value_of:
                if LONG_OPTION.match(arg):
                    yield Problem(value_of, None, f"needs a value: {value_of} VALUE")
                value_of = ""
            if name in options:
                if not equals and not getattr(options[name], "is_flag", False):
                    value_of = name
            elif LONG_OPTION.match(arg):
                if not free_form:
                    yield unknown_option(name, arg, options, keys=self._keys())
            elif not free_form:
                problem = option_for_assignment(arg, options, keys=self._keys())
                if problem is not None:
                    yield problem


def _no_type(ctx: Any) -> str:
    return ""


class Group(TyperGroup):
    """The program itself: its commands, and suggestions for unknown ones."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["COMMAND ..."]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        if not args or args[0] in HELP:
            _print_help(ctx)
        options: list[str] = []
        for param in self.params:
            options += param.opts
        first = args[0].partition("=")[0]
        if first.startswith("-") and first not in options:
            known = [*options, *HELP]
            hint = f"unknown option; there are {choices(known)}.{did_you_mean(first, known)}"
            raise UserError(Problem(first, None, hint))
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and not ctx.resilient_parsing:
            hint = f"there are {choices(self.commands)}.{did_you_mean(args[0], self.commands)}"
            raise UserError(Problem(f"no command {args[0]!r}", None, hint))
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Group,
    rich_markup_mode=None,
    context_settings={"help_option_names": list(HELP), "max_content_width": 110},
    epilog="\b\nExample: flora-train train recipe=quickstart training.steps=20 output_dir=outputs/short",
)


def command(
    usage: str, *, overrides: bool = False, recipe: bool = False, free_form: bool = False
) -> Callable[[Function], Function]:
    """Register a function as a command of its name. usage: its arguments; overrides: it takes key=value for
    some keys; recipe: it takes all keys; free_form: it takes nothing else, so that options of other programs
    reach the function."""

    def register(function: Function) -> Function:
        members = {"usage": usage, "takes_overrides": overrides, "takes_recipe": recipe}
        settings = {"ignore_unknown_options": free_form}
        app.command(cls=type("Command", (Command,), members), context_settings=settings)(function)
        return function

    return register


def _show_version(asked: bool) -> None:
    if asked:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Train many adapters at once on one frozen base model."""


def run_command(argv: Sequence[str]) -> int:
    """Run one command. Returns 0, or raises UserError."""
    argv = list(argv)
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    parser = load_parser()
    if COMPLETION in os.environ:
        parser.main(argv, prog_name=PROGRAM, complete_var=COMPLETION)
    try:
        with parser.make_context(PROGRAM, argv) as context:
            parser.invoke(context)
    except typer.Exit as end:
        return int(end.exit_code)
    except ParserError as error:
        raise UserError(_problem(error)) from None
    return 0


def load_parser() -> Any:
    """The parser with all commands."""
    for name in COMMANDS:
        import_module(f"flora_train.cli.{name.replace('-', '_')}")
    parser = typer.main.get_command(app)
    for option in parser.params:
        if option.name == "show_completion":
            # Rarely used; without it, the list of commands fits a screen.
            option.hidden = True  # type: ignore[attr-defined]
    return parser


def check_arguments(argv: Sequence[str]) -> None:
    """Raises UserError where a command line does not fit its command; runs nothing."""
    parser = load_parser()
    name, *args = argv
    if name not in parser.commands:
        raise UserError(Problem(f"no command {name!r}", None, f"there are {choices(parser.commands)}"))
    try:
        parser.commands[name].make_context(f"{PROGRAM} {name}", args)
    except ParserError as error:
        raise UserError(_problem(error)) from None


def _print_help(ctx: Any) -> None:
    print(ctx.get_help())
    raise typer.Exit


def _problem(error: Any) -> Problem:
    """The parser's error in the form of all other errors."""
    usage = ""
    if error.ctx is not None:
        usage = " ".join(error.ctx.get_usage().split()).removeprefix("Usage: ")
    param = getattr(error, "param", None)
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "MissingParameter" and param is not None:
        return Problem(_shown_name(param), None, f"is required; usage: {usage}")
    if param is not None:
        return Problem(_shown_name(param), None, _value_hint(error))
    if type(error).__name__ == "NoSuchOption":
        return Problem(str(option), None, f"unknown option; usage: {usage}")
    if option is not None:
        return Problem(
            str(option), None, _sentence(error.format_message().partition("'")[2].partition("' ")[2])
        )
    return Problem(usage or PROGRAM, None, _sentence(error.format_message()))


def _shown_name(param: Any) -> str:
    options = [name for name in param.opts if name.startswith("--")]
    return options[0] if options else str(param.metavar or param.name)


def _value_hint(error: Any) -> str:
    message = error.message
    if "valid integer" in message:
        return "must be a whole number"
    if "valid number" in message or "valid float" in message:
        return "must be a number"
    return _sentence(message)


def _sentence(message: str) -> str:
    return message[:1].lower() + message[1:].rstrip(".")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
