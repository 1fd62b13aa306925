"""The command line of vLLM: what is chosen from the adapters, and what the user's flags change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flora_train.config.errors import UserError
from flora_train.serving.vllm_flags import (
    Base,
    Flags,
    Launch,
    command,
    cpu_environment,
    served_rank,
    split_words,
)


def launch(count: int = 2, rank: int = 4, **options: object) -> Launch:
    adapters = {f"a{i}": Path(f"/adapters/a{i}") for i in range(count)}
    values = {"count": count, "host": "127.0.0.1", "port": 8000, **options}
    return Launch(Base("base", dtype="float32"), adapters, rank, **values)  # type: ignore[arg-type]


def words(*flags: str, on_cpu: bool = True, **options: object) -> list[str]:
    return command(launch(**options), Flags(flags), on_cpu=on_cpu)  # type: ignore[arg-type]


def value(command: list[str], name: str) -> str:
    assert command.count(name) == 1
    return command[command.index(name) + 1]


def test_limits_follow_the_adapters() -> None:
    few = words(count=3, rank=5)
    assert few[:3] == ["base", "--host", "127.0.0.1"]
    assert [value(few, name) for name in ("--max-lora-rank", "--max-loras", "--max-cpu-loras")] == [
        "8",
        "3",
        "3",
    ]
    many = words(count=1000, rank=33)
    limits = [value(many, name) for name in ("--max-lora-rank", "--max-loras", "--max-cpu-loras")]
    assert limits == ["64", "8", "256"]
    assert "--enforce-eager" in few
    assert "--enforce-eager" not in words(on_cpu=False)


def test_flags_of_the_user_take_the_place_of_defaults() -> None:
    flags = ("--max_lora_rank=64", "--max-loras", "16", "--dtype", "bfloat16", "--no-enforce-eager")
    line = words(*flags, count=3)
    assert "--max-lora-rank" not in line
    assert value(line, "--max-loras") == "16"
    assert value(line, "--max-cpu-loras") == "16"
    assert value(line, "--dtype") == "bfloat16"
    assert "--enforce-eager" not in line
    assert "--trust-remote-code" not in line


def test_adapters_come_last_and_every_name_is_carried() -> None:
    names = ["lua-lora", "a=b", 'it\'s "odd", {x}', "naïve\\"]
    adapters = {name: Path("/some folder") / name for name in names}
    line = command(Launch(Base("base"), adapters, 1, 4, "127.0.0.1", 1), Flags(("-tp", "2")), on_cpu=False)
    start = line.index("--lora-modules")
    assert line[start - 2 : start] == ["-tp", "2"]
    read = [json.loads(word) for word in line[start + 1 :]]
    assert [(entry["name"], entry["path"]) for entry in read] == [(n, f"/some folder/{n}") for n in names]


def test_a_server_without_adapters_has_no_modules() -> None:
    line = words(count=0)
    assert "--lora-modules" not in line
    assert value(line, "--max-loras") == "1"


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_served_ranks(rank: int, allowed: int) -> None:
    assert served_rank(rank) == allowed


def test_a_rank_above_all_limits_is_refused() -> None:
    with pytest.raises(UserError, match="serves ranks up to 512"):
        served_rank(513)


def test_words_are_names_until_the_first_flag() -> None:
    assert split_words(["a", "b", "--x", "c", "--", "--y"]) == (["a", "b"], Flags(("--x", "c", "--y")))
    assert split_words(["a"]) == (["a"], Flags())
    assert split_words(["-tp", "2"]) == ([], Flags(("-tp", "2")))


def test_the_value_of_a_flag() -> None:
    flags = Flags(("--api-key", "one", "--dtype=half", "--api_key=two", "--last"))
    assert flags.value("--api-key") == "two"
    assert flags.value("--dtype") == "half"
    assert flags.value("--last") == ""
    assert flags.value("--other") is None
    assert "--api-key" in flags
    assert "--other" not in flags


@pytest.mark.parametrize(
    "flag", ["--model", "--lora-modules", "--lora_modules=a=b", "--port", "--host=::", "--uds"]
)
def test_flags_that_are_set_here_are_refused(flag: str) -> None:
    with pytest.raises(UserError):
        Flags((flag,)).check()
    Flags(("--max-num-seqs", "8")).check()


def test_the_cache_on_a_cpu_is_a_quarter_of_the_free_memory() -> None:
    sizes = [cpu_environment(gib * 2**30)["VLLM_CPU_KVCACHE_SPACE"] for gib in (1, 9, 32, 1000)]
    assert sizes == ["1", "2", "8", "16"]
