"""flora-train chat: answers equal those of transformers, conversations, wrong input, and a real terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.chat_base import conversations, save_chat_base, write_recipe, write_rows
from tests.e2e.conftest import Launch, launch_environment
from tests.forked import ROOT, python

MAIN = "import sys; from flora_train.__main__ import start; start({words!r})"
SAID = "import io, sys; sys.stdin = io.StringIO({said!r})\n"
GREEDY = ("--temperature", "0", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("talk")


@pytest.fixture(scope="module")
def run(folder: Path, launch: Launch) -> Path:
    """Two adapters that learn conversations, whose sample prompts are texts and messages."""
    model = save_chat_base(folder / "model")
    prompts = [[{"role": "system", "content": "short"}, {"role": "user", "content": "say no"}], "say ja"]
    task = {
        "train": write_rows(folder / "rows.jsonl", conversations("ja no hm oh ah eh" * 2)),
        "sample_prompts": prompts,
    }
    recipe = write_recipe(folder, model, {"talk": task})
    done = launch(f"recipe={recipe}", f"output_dir={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def chat(run: Path, *words: str, said: str, cache: Path) -> subprocess.CompletedProcess[str]:
    program = SAID.format(said=said) + MAIN.format(words=["chat", str(run), *words])
    return python("-c", program, environment=launch_environment(cache))


def answers(output: str) -> list[tuple[str, str]]:
    """(contender, answer) in the order of the output."""
    parts = re.split(r"^\[([\w-]+)\]\n", output, flags=re.MULTILINE)[1:]
    return [(name, text.split("\n\n")[0]) for name, text in zip(parts[::2], parts[1::2], strict=True)]


class Reference:
    """Plain transformers and peft, with the same greedy answers."""

    def __init__(self, run: Path, adapter: str | None) -> None:
        base = run.parent / "model"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self.model: Any = AutoModelForCausalLM.from_pretrained(base)
        if adapter is not None:
            self.model = PeftModel.from_pretrained(self.model, run / "adapters" / adapter)
        self.end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def answer(self, messages: list[dict[str, str]], tokens: int = 12) -> str:
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ends = [self.tokenizer.eos_token_id, self.end]
        with torch.no_grad():
            out = self.model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=ends, pad_token_id=0
            )
        new = out[0, inputs["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True))


def escaped(text: str) -> str:
    """A text as a terminal gets it."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text.strip("\n"))


def test_answers_are_those_of_transformers_with_a_history_for_each(run: Path, tmp_path: Path) -> None:
    said = ["say ja", "more"]
    done = chat(run, *GREEDY, "--system", "short", said="\n".join(said), cache=tmp_path)
    assert done.returncode == 0, done.stderr
    found = answers(done.stdout)
    assert [name for name, _ in found] == ["base", "talk-flora", "talk-lora"] * 2
    for number, (name, adapter) in enumerate((("base", None), ("talk-lora", "talk-lora"))):
        reference = Reference(run, adapter)
        history = [{"role": "system", "content": "short"}]
        for text, (_, answer) in zip(said, [one for one in found if one[0] == name], strict=True):
            history.append({"role": "user", "content": text})
            expected = reference.answer(history)
            assert answer == escaped(expected), (number, text)
            history.append({"role": "assistant", "content": expected})


def test_an_answer_does_not_depend_on_who_else_answers(run: Path, tmp_path: Path) -> None:
    warm = ("--temperature", "1.5", "--seed", "7", "--max-new-tokens", "20")
    said = "say ja\nmore\n"
    together = answers(chat(run, *warm, said=said, cache=tmp_path).stdout)
    alone = answers(chat(run, "talk-lora", *warm, said=said, cache=tmp_path).stdout)
    assert alone == [one for one in together if one[0] != "talk-flora"]
    other = answers(chat(run, "talk-lora", *warm[:3], "8", *warm[4:], said=said, cache=tmp_path).stdout)
    assert other != alone


def test_commands_switch_reset_and_help(run: Path, tmp_path: Path) -> None:
    said = [
        "say ja",
        "/adapter talk-lora",
        "say ja",
        "/reset",
        "say ja",
        "/adapter base",
        "/adapter",
        "/adapter tlk-lora",
        "/rest",
        "//a text",
        '"""two',
        'lines"""',
        "/help",
        "/quit",
        "never read",
    ]
    done = chat(run, *GREEDY, said="\n".join(said), cache=tmp_path)
    assert done.returncode == 0, done.stderr
    found = answers(done.stdout)
    names = ["base", "talk-flora", "talk-lora", "base", "talk-lora", "base", "talk-lora", "base", "base"]
    assert [name for name, _ in found] == names
    first, second, third = found[:3], found[3:5], found[5:7]
    assert third == [first[0], first[2]]
    assert second != third  # with the history of the first text
    assert "* base\n  talk-flora\n  talk-lora\n" in done.stdout
    assert "error: /adapter = 'tlk-lora': the run has no such adapter; there are base, " in done.stdout
    assert "Did you mean 'talk-lora'?" in done.stdout
    assert "error: /rest: there are /adapter, /reset, /help, /quit. Did you mean '/reset'?" in done.stdout
    assert "/adapter NAME ..." in done.stdout
    assert "never read" not in done.stdout


def test_what_a_model_writes_cannot_control_the_terminal(run: Path, tmp_path: Path) -> None:
    """With this seed, a model that writes any bytes writes an escape first."""
    hot = ("--temperature", "100", "--top-p", "1", "--max-new-tokens", "20", "--seed", "1152")
    done = chat(run, *hot, said="a\nb\n", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\\x1b" in done.stdout
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.stdout)


def test_context_that_is_full_is_said_with_what_to_do(run: Path, tmp_path: Path) -> None:
    said = f"{'x' * 480}\n{'y' * 300}\n/reset\nagain\n/reset\n{'z' * 600}\n"
    done = chat(run, "talk-lora", "--temperature", "0", "--max-new-tokens", "100", said=said, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"error: the conversation with (base|talk-lora): has \d+ tokens, and the model reads at most 512: "
        r"/reset begins a new one",
        done.stdout,
    )
    assert re.search(r"has \d+ tokens, and the model reads at most 512: shorten the text", done.stdout)
    assert "cut off, the model's context is full; /reset begins a new conversation" in done.stdout
    assert len(answers(done.stdout)) == 4


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["talk-lra"],
            "adapter = 'talk-lra': the run has no such adapter; there are talk-flora or talk-lora. ",
        ),
        (["--temperature", "-1"], "temperature = -1.0: must be at least 0"),
        (["--max-new-tokens", "0"], "max_new_tokens = 0: must be at least 1"),
        (
            ["--chat-template", "chatlm"],
            "--chat-template = 'chatlm': is neither a .jinja file nor a template by ",
        ),
        (["--chat-template", "no.jinja"], "--chat-template = 'no.jinja': no such file in "),
        (["--temprature", "1"], "--temprature: unknown option; "),
    ],
)
def test_wrong_input_is_one_line(words: list[str], error: str, run: Path, tmp_path: Path) -> None:
    done = chat(run, *words, said="hello\n", cache=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {error}")
    assert done.stdout == ""


def test_a_base_without_a_template_needs_one_or_continues_texts(
    folder: Path, run: Path, tmp_path: Path
) -> None:
    tokenizer_template = folder / "model" / "chat_template.jinja"
    tokenizer_template.rename(folder / "away.jinja")
    try:
        done = chat(run, *GREEDY, said="hello\n", cache=tmp_path)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: chat_template: the tokenizer of ")
        assert "give --chat-template NAME" in line
        assert "--plain" in line
        given = chat(
            run, *GREEDY, "--chat-template", str(folder / "away.jinja"), said="say ja\n", cache=tmp_path
        )
        plain = chat(run, *GREEDY, "--plain", said="say ja\nsay ja\n", cache=tmp_path)
    finally:
        (folder / "away.jinja").rename(tokenizer_template)
    own = chat(run, *GREEDY, said="say ja\n", cache=tmp_path)
    assert answers(given.stdout) == answers(own.stdout)
    continued = answers(plain.stdout)
    assert continued[:3] == continued[3:]  # no history
    samples = report(run)["completions"]
    for name, text in continued[:3]:
        assert text.startswith(escaped(samples[1]["completions"][name.removeprefix("talk-")]))


def report(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "eval" / "report.json").read_text()))


def test_sample_prompts_of_messages_are_answered_and_reported(run: Path) -> None:
    dialogue, text = report(run)["completions"]
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "say no"}]
    assert dialogue["prompt"] == messages
    assert text["prompt"] == "say ja"
    for family, adapter in (("base", None), ("lora", "talk-lora")):
        assert dialogue["completions"][family] == Reference(run, adapter).answer(messages, tokens=8)
    page = (run / "eval" / "report.html").read_text()
    assert '<dl class="dialogue">' in page
    assert re.search(r"<dt>user</dt>\s*<dd><pre [^>]*><code>say no</code>", page)
    card = (run / "adapters" / "talk-lora" / "README.md").read_text()
    assert '    {"role": "user", "content": "say no"},' in card
    assert "tokenizer.apply_chat_template(" in card


class Terminal:
    """A process with a terminal of its own."""

    def __init__(self, *words: str, cache: Path, width: int = 100) -> None:
        environment = launch_environment(cache) | {
            "TERM": "xterm-256color",
            "COLUMNS": str(width),
            "LINES": "40",
        }
        environment.pop("NO_COLOR", None)
        self._pid, self._terminal = pty.fork()
        if not self._pid:
            os.chdir(ROOT)
            command = [sys.executable, "-m", "flora_train", *words]
            os.execve(sys.executable, command, environment)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        self.output = ""
        self._read_to = 0

    def press(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def press_until(self, keys: str, text: str) -> None:
        """Press keys, again where they came before the prompt read them, until `text` is shown."""
        begin, end = self._read_to, time.monotonic() + 120.0
        while text not in self.output[begin:]:
            assert time.monotonic() < end, self.output[-2000:]
            self.press(keys)
            self._read(2.0)
            self._read(0.2)
        self._read_to = self.output.index(text, begin) + len(text)

    def wait_for(self, text: str, seconds: float = 120.0) -> str:
        """Output from the last call on until `text`."""
        end = time.monotonic() + seconds
        while text not in self.output[self._read_to :]:
            assert time.monotonic() < end, self.output[-2000:]
            self._read(0.1)
        begin = self._read_to
        self._read_to = self.output.index(text, begin) + len(text)
        return self.output[begin : self._read_to]

    def end(self) -> int:
        """Its exit status."""
        while self._read(1.0):
            pass
        _, status = os.waitpid(self._pid, 0)
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(status)

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._terminal], [], [], seconds)
        if not ready:
            return True
        try:
            content = os.read(self._terminal, 1 << 16)
        except OSError:  # the process has ended
            return False
        self.output += content.decode(errors="replace")
        return bool(content)


def test_at_a_terminal_answers_are_columns_and_ctrl_c_stops_them(run: Path, tmp_path: Path) -> None:
    terminal = Terminal("chat", str(run), "--max-new-tokens", "300", "--seed", "3", cache=tmp_path)
    terminal.wait_for("you> ")
    terminal.press("say ja\r")
    heading = terminal.wait_for("talk-lora")
    assert re.search(r"base\S* +\S* │ \S*talk-flora", heading)
    terminal.wait_for("│")
    terminal.press("\x03")
    terminal.wait_for("(stopped)")
    for _ in range(2):  # as often as one likes
        terminal.wait_for("you> ")
        terminal.press_until("\x03", "Ctrl-D or /quit leaves")
    terminal.wait_for("you> ")
    terminal.press("\x04")
    assert terminal.end() == 0


def test_a_narrow_terminal_shows_one_after_the_other(run: Path, tmp_path: Path) -> None:
    terminal = Terminal("chat", str(run), *GREEDY, cache=tmp_path, width=60)
    terminal.wait_for("you> ")
    terminal.press("say ja\r")
    shown = terminal.wait_for("you> ")
    assert "│" not in shown
    assert [name for name, _ in answers(re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown).replace("\r", ""))] == [
        "base",
        "talk-flora",
        "talk-lora",
    ]
    terminal.press("/quit\r")
    assert terminal.end() == 0


def test_a_reader_that_leaves_ends_it_quietly(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flora_train", "chat", str(run), *GREEDY]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=launch_environment(tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.write(b"hello\n")
        process.stdin.close()
        errors = process.stderr.read().decode() if process.stderr else ""
    assert process.returncode == 0
    assert "Error" not in errors
