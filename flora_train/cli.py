"""flora-train: what can one ask for on the command line?"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flora_train.config.errors import UserError, choices, did_you_mean, user_error
from flora_train.config.terminal_text import plain, print_plain, safe_streams, write_failure
from flora_train.runtime.logging import init_logging, stop_logging
from flora_train.runtime.signals import SAVED, STOPPED, Interrupted, end_with_launcher, stop_on_interrupt

# torch's threads wait for each other by spinning, which starves whatever else wants the same cores: another process, or the
# threads that compute adapters (kernels/threads.py). It is read when torch loads, which is after this module.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _keep_freed_memory() -> None:
    """A step frees and takes the same memory again and again. glibc would give it back to the system in between, and the
    system fill it with zeros again, page by page."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and "MALLOC_TRIM_THRESHOLD_" not in os.environ:  # not with another C library
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


_keep_freed_memory()


@dataclass(frozen=True)
class Command:
    """usage: its arguments; help: one line; least, most: how many words it takes (most None: any number)."""

    usage: str
    help: str
    example: str
    run: Callable[[Sequence[str]], None]
    least: int = 1
    most: int | None = 1


def main(words: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 2 after an error that the user can mend, 75 (SAVED) where a run was told to
    end (SIGTERM, SIGINT) and can go on, or 130 (STOPPED) after Ctrl-C elsewhere."""
    with safe_streams():
        try:
            init_logging()
            with stop_on_interrupt():
                status = _run(list(sys.argv[1:] if words is None else words) or ["--help"])
                if sys.stdout is not None:  # closed by the caller (>&-)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":
                print("interrupted: what was written is whole", file=sys.stderr)
            return STOPPED
        finally:
            stop_logging()
        if (failure := write_failure()) is not None:
            return _complain(str(user_error("standard output", None, f"could not be written ({failure.strerror})").problems[0]))
    return status


def _run(words: Sequence[str]) -> int:
    command, *rest = words
    if command in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if command not in COMMANDS:
        return _complain(f"no command {command!r}; there are {choices(COMMANDS)}.{did_you_mean(command, COMMANDS)}")
    entry = COMMANDS[command]
    if {"-h", "--help"} & set(rest):
        print(f"flora-train {command} {entry.usage}\n\n{entry.help}\n\nExample: {entry.example}")
        return 0
    if len(rest) < entry.least or (entry.most is not None and len(rest) > entry.most):
        return _complain(f"usage: flora-train {command} {' '.join(entry.usage.split())}")
    try:
        entry.run(rest)
    except UserError as error:
        return _complain(*map(str, error.problems))
    except OSError as error:  # of the system, where no closer place knows more
        return _complain(
            f"{error.filename or command}: {error.strerror or error}: mend that, or choose another place, and run again"
        )
    except Interrupted as pause:
        if os.environ.get("RANK", "0") == "0":
            print(str(pause), file=sys.stderr)
        return SAVED
    return 0


def _complain(*lines: str) -> int:
    for line in lines if os.environ.get("LOCAL_RANK", "0") == "0" else ():  # once per machine, not per process
        print(f"error: {plain(line)}", file=sys.stderr)
    return 2


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = (f"  {name:{width}}  {entry.help}" for name, entry in COMMANDS.items())
    return "\n".join(
        [
            "flora-train COMMAND ...: train many adapters at once on one frozen base model",
            "",
            *rows,
            "",
            "flora-train COMMAND --help: its arguments",
            f"Example: {EXAMPLE}",
        ]
    )


def _train(words: Sequence[str]) -> None:
    from flora_train.config.load import load_config

    config = load_config(words)
    end_with_launcher()
    from flora_train.commands.train import train_run  # torch loads only once the words make sense

    train_run(config)


def _doctor(words: Sequence[str]) -> None:
    if not words:
        from flora_train.commands.doctor import check_machine

        return check_machine()
    from flora_train.config.load import load_config

    config = load_config(words)
    from flora_train.commands.doctor import doctor

    doctor(config)


def _plan(words: Sequence[str]) -> None:
    from flora_train.config.load import load_config

    config = load_config(words)
    from flora_train.commands.plan import plan_run

    plan_run(config)


def _solve(words: Sequence[str]) -> None:
    from flora_train.commands.solve import solve_run

    solve_run(words[0], words[1:])


def _execute(words: Sequence[str]) -> None:
    from flora_train.commands.execute import execute_completions

    execute_completions(words[0], words[1:])


def _recipes(words: Sequence[str]) -> None:
    from flora_train.config.load import shipped

    for name, path in sorted(shipped("recipes").items()):
        first = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        print_plain(f"{name:20} {first}")


def _evaluate(words: Sequence[str]) -> None:
    from flora_train.commands.evaluate import evaluate_words

    evaluate_words(words)


def _report(words: Sequence[str]) -> None:
    from flora_train.commands.report import draw_reports

    draw_reports(words)


def _export(words: Sequence[str]) -> None:
    from flora_train.commands.export import export_words

    export_words(words)


def _convert(words: Sequence[str]) -> None:
    from flora_train.commands.convert import convert_adapter

    convert_adapter(words)


def _push(words: Sequence[str]) -> None:
    from flora_train.commands.push import push_run

    push_run(words)


def _init(words: Sequence[str]) -> None:
    from flora_train.commands.init import init_recipe

    init_recipe(words)


EXAMPLE = "flora-train train recipe=quickstart training.steps=20 output_dir=outputs/short"
COMMANDS = {
    "train": Command("recipe=NAME [key.sub=value ...]", "train, evaluate, report and export one run", EXAMPLE, _train, 0, None),
    "init": Command(
        "FILE_OR_FOLDER ... [--model MODEL] [--out RECIPE.yaml] [--language CODE]",
        "write a commented recipe for your own files, and check it",
        "flora-train init data/support.jsonl src --model assets/models/smollm2-135m --out mine.yaml",
        _init,
        1,
        None,
    ),
    "doctor": Command(
        "[recipe=NAME key.sub=value ...]",
        "say what this machine is ready for; of a recipe what would compute its adapters, and why",
        "flora-train doctor recipe=quickstart adapters.flora.rank=16",
        _doctor,
        0,
        None,
    ),
    "plan": Command(
        "recipe=NAME [key.sub=value ...]",
        "say what a run would take of memory, disk and time, and whether it fits",
        "flora-train plan recipe=quickstart adapters.device_slots=6",
        _plan,
        0,
        None,
    ),
    "recipes": Command("", "list the recipes that ship", "flora-train recipes", _recipes, 0, 0),
    "evaluate": Command(
        "RUN [--allow-different-base] [--allow-different-data]",
        "judge a run's kept adapters again",
        "flora-train evaluate outputs/quickstart",
        _evaluate,
        1,
        None,
    ),
    "report": Command(
        "RUN [RUN ...] [--out FILE.html]",
        "draw a run's report again, or several runs beside each other",
        "flora-train report outputs/quickstart outputs/quickstart_sweep",
        _report,
        1,
        None,
    ),
    "solve": Command(
        "RUN [languages=[lua,...]] [contenders=[PEFT,...]] [evaluation.KEY=VALUE] [out=FOLDER] [multipl_e=FOLDER] [--allow-different-base]",
        "let a run's base and adapters solve programming problems, and say pass@k",
        "flora-train solve outputs/quickstart evaluation.problems=starter evaluation.num_samples=20 evaluation.pass_at_k=[1,10]",
        _solve,
        1,
        None,
    ),
    "execute": Command(
        "COMPLETIONS [prompts=FOLDER] [languages=[lua,...]] [k=[1,10]] [sandbox=none] [workers=N] [out=FILE]",
        "run generated programs in the sandbox and say pass@k",
        "flora-train execute completions.jsonl prompts=multipl_e",
        _execute,
        1,
        None,
    ),
    "export": Command(
        "RUN [ADAPTER ...] [--as peft|flora|merged|lora-svd] [--rank N] [--max-error X] [--out FOLDER] "
        "[--allow-different-base|-data]",
        "write adapters for other programs: PEFT's folders, plain models, or the closest LoRA",
        "flora-train export outputs/quickstart lua-flora --as lora-svd --max-error 0.2",
        _export,
        1,
        None,
    ),
    "convert": Command(
        "PEFT_LORA --out FOLDER [--rank N] [--model MODEL]",
        "make a fLoRA that is close to a LoRA, and say how close",
        "flora-train convert outputs/quickstart/adapters/lua-lora --out outputs/lua-flora --rank 8",
        _convert,
        1,
        None,
    ),
    "push": Command(
        "RUN [ADAPTER ...] --repo ORG/NAME [--repo-per-adapter] [--base ORG/MODEL] [--public] [--dry-run] [--allow-different-base]",
        "put adapters, their cards and the report on the Hugging Face hub",
        "flora-train push outputs/quickstart --repo me/quickstart --base HuggingFaceTB/SmolLM2-135M --dry-run",
        _push,
        1,
        None,
    ),
}
