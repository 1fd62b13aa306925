"""flora-train serve: models, requests as printed, the check against the trainer, and its end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.serving.server import SMALL, Server, free_port
from tests.serving.tiny import save_base, save_recipe

PROGRAM = ("-m", "flora_train")
NAMES = [f"{task}-{family}" for task in ("digits", "letters") for family in ("flora", "ia3", "lora")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two tasks and three methods."""
    folder = tmp_path_factory.mktemp("serve")
    recipe = save_recipe(folder / "recipe", save_base(folder / "base"))
    done = subprocess.run(
        [sys.executable, *PROGRAM, "train", f"recipe={recipe}", f"output_dir={folder / 'run'}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "run"


@pytest.fixture(scope="module")
def served(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The run, checked and announced."""
    log = tmp_path_factory.mktemp("log") / "log.txt"
    port = free_port()
    words = [*PROGRAM, "serve", str(run), "--check", "--port", str(port), *SMALL[2:]]
    server = Server(words, port, log)
    server.wait_for_output("print(answer.choices[0].text)")
    yield server
    server.stop()


def test_the_base_and_all_adapters_are_served_as_they_were_trained(served: Server) -> None:
    listed = [model["id"] for model in served.get("/v1/models")["data"]]
    assert listed[0] == "base"
    assert sorted(listed[2:]) == NAMES
    differences = re.findall(r"^ *(\S+) +\d+ +(\d\.\d\de[-+]\d\d) +\d+\.\d\d +the same", served.output, re.M)
    assert sorted(name for name, _ in differences) == ["base", *NAMES]
    assert max(float(value) for _, value in differences) <= 1e-4
    assert len({served.complete(name, "0a") for name in ["base", *NAMES]}) > 3


def test_the_printed_curl_line_works(served: Server) -> None:
    line = next(line for line in served.output.splitlines() if line.startswith("curl "))
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert '"model":"digits-flora"' in done.stdout, (done.stdout, done.stderr)
    assert '"text"' in done.stdout


def test_the_printed_python_works(served: Server) -> None:
    begin = served.output.index("from openai import OpenAI")
    source = served.output[begin:].partition(".text)")[0] + ".text)\n"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_unknown_models_and_loading_are_refused(served: Server, run: Path) -> None:
    status, content = served.post("/v1/completions", {"model": "letters-flor", "prompt": "a"})
    assert status == 404
    assert "letters-flor" in content["error"]["message"]
    folder = str(run / "adapters" / NAMES[0])
    status, _ = served.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": folder})
    assert status == 404


def test_a_port_in_use_is_reported_before_anything_long(served: Server, run: Path) -> None:
    done = serve_briefly(run, "--port", str(served.port))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --port = {served.port}: cannot be listened on")


def test_ctrl_c_ends_server_and_engine(run: Path, served: Server) -> None:
    """The last test of the server."""
    children = descendants(served.process.pid)
    assert len(children) >= 2
    assert served.stop(signal.SIGINT) == 0
    assert not [pid for pid in children if Path(f"/proc/{pid}/cmdline").exists() and is_running(pid)]
    assert "Traceback" not in served.output
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", served.port))


def descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def is_running(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def serve_briefly(*words: object) -> subprocess.CompletedProcess[str]:
    """A call that must end by itself."""
    return subprocess.run(
        [sys.executable, *PROGRAM, "serve", *map(str, words)],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_another_adapter_than_the_trained_one_fails_the_check(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    weights = copy / "adapters" / "letters-lora" / "adapter_model.safetensors"
    save_file({name: 1.5 * tensor for name, tensor in load_file(weights).items()}, weights)
    done = serve_briefly(copy, "letters-lora", "digits-ia3", "--check", "--port", "0", *SMALL[2:])
    assert done.returncode == 2
    assert "log-probabilities of = 'letters-lora': differ by up to" in done.stderr
    assert "1 of 3 models" in done.stderr
    assert "serving at" not in done.stdout


def test_wrong_options_of_vllm_are_reported_before_the_check_computes(run: Path) -> None:
    done = serve_briefly(run, "--check", "--port", "0", "--max-num-seqz", "8")
    assert done.returncode == 2
    assert "error: vllm serve: refuses its flags:" in done.stderr
    assert "computing log-probabilities" not in done.stderr
