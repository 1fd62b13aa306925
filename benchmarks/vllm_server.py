"""What the benchmarks of serving share: vLLM's environment, adapters as folders, and a server as a child
process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-serving" / "bin" / "python"
MODEL = ROOT / "assets" / "models" / "smollm2-135m"
READY_SECONDS = 300.0
"""Until a server must answer."""
STOP_SECONDS = 30.0
"""Between the request to end and SIGKILL."""
FIRST_LINES = 4000
"""Characters of a log that an error shows."""
DEFAULTS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def use_serving_environment() -> None:
    """Continue this script in an environment with vLLM, which `make serving-env` installs where missing."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # `running` ends the servers
    if find_spec("vllm") is not None:
        return
    if not PYTHON.exists():
        subprocess.run(["make", "serving-env"], cwd=ROOT, check=True)
    os.execv(PYTHON, [str(PYTHON), *sys.argv])


def versions() -> str:
    """`vLLM 0.32.0, torch 2.13.0, ...`."""
    try:
        parts = [f"vLLM {version('vllm')}"]
    except ModuleNotFoundError:
        parts = [f"vllm-cpu {version('vllm-cpu')}"]
    return ", ".join([*parts, *(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """vLLM's OpenAI-compatible server with the plugin, or without it, as stock vLLM."""

    def __init__(
        self,
        model: Path,
        log: Path,
        flags: Sequence[str],
        *,
        modules: Mapping[str, Path] | None = None,
        plugin: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port, self.log = free_port(), log
        command = [sys.executable, "-m", "flora_train.serving.launch", str(model), *flags]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "base"]
        if modules:
            values = [json.dumps({"name": name, "path": str(path)}) for name, path in modules.items()]
            command += ["--lora-modules", *values]
        variables = {**os.environ, **(environment or {})}
        if not plugin:
            variables["VLLM_PLUGINS"] = ""
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-FIRST_LINES:]

    def check_alive(self) -> None:
        """Raises RuntimeError with the end of the log if the server or its engine has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
        if self.request("/health")[0] != 200:
            raise RuntimeError(f"the engine has ended:\n{self.tail()}")

    def wait_until_ready(self) -> None:
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            try:
                if self.request("/health")[0] == 200:
                    return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"the server did not answer within {READY_SECONDS:.0f} s:\n{self.tail()}")

    def request(
        self, path: str, content: Mapping[str, Any] | bytes | None = None, *, timeout: float = 300
    ) -> tuple[int, Any]:
        """(HTTP status, content): a GET without content. Raises OSError if there is no answer."""
        data = content
        if isinstance(content, Mapping):
            data = json.dumps(content).encode()
        request = Request(self.url + path, data, headers={"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=timeout) as answer:
                return int(answer.status), _content(answer.read())
        except HTTPError as error:
            return error.code, _content(error.read())
        except URLError as error:
            raise ConnectionError(str(error.reason)) from error

    def complete(self, model: str, prompt: str | list[int], tokens: int) -> dict[str, Any]:
        """One greedy completion of exactly this number of tokens. Raises RuntimeError if it is refused."""
        content = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        status, answer = self.request("/v1/completions", {**content, "ignore_eos": True})
        if status != 200:
            raise RuntimeError(f"{model}: {answer}\n{self.tail()}")
        return dict(answer)

    def resident_bytes(self) -> dict[str, int]:
        """Resident memory of the server's process and of all its children, the engine's among them."""
        import psutil

        server = psutil.Process(self.process.pid)
        children = 0
        for child in server.children(recursive=True):
            try:
                children += child.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return {"server": server.memory_info().rss, "engine": children}

    def stop(self) -> None:
        """End it and its engine."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):  # what is left of its session
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _content(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")


@contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Wait until the servers answer, and end them afterwards."""
    try:
        for server in servers:
            server.wait_until_ready()
        yield
    finally:
        for server in servers:
            server.stop()


def adapter_banks(
    model: Path, folder: Path, methods: Mapping[str, Mapping[str, Any]], count: int
) -> Iterator[tuple[str, Any]]:
    """Write `count` different adapters of each family to `folder/FAMILY-NUMBER`; yield (family, its bank).

    methods: family -> options of the adapter, `method` among them. Every parameter gets 1 % noise.
    """
    import torch

    from flora_train.adapters.bank import AdapterBank
    from flora_train.adapters.spec import make_spec
    from flora_train.config.adapter_schema import AdapterConfig
    from flora_train.config.model_schema import ModelConfig
    from flora_train.export.peft_format import export_peft
    from flora_train.export.peft_forms import BaseModel
    from flora_train.models.loading import load_base_model

    config = ModelConfig(path=str(model), dtype="float32")
    for number, (family, options) in enumerate(methods.items()):
        adapter = AdapterConfig(**{"lr": 1e-3, **options})
        specs = [make_spec(str(i), family, adapter, default_steps=1) for i in range(count)]
        bank = AdapterBank.attach(load_base_model(config, torch.device("cpu")).eval(), specs)
        generator = torch.Generator().manual_seed(number)
        for i, spec in enumerate(specs):
            row = bank.row(i)
            row += 0.01 * torch.randn(row.shape, generator=generator)
            export_peft(bank, spec.name, folder / f"{family}-{i}", base=BaseModel(str(model)))
        yield family, bank


def save_adapters(model: Path, folder: Path, methods: Mapping[str, Mapping[str, Any]], count: int) -> None:
    """`adapter_banks` for the folders alone."""
    for _ in adapter_banks(model, folder, methods, count):
        pass
