"""Catalogues: which adapters a source has, names that are no paths, and hub repositories at one commit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flora_train.config.errors import UserError
from flora_train.runtime.hub_snapshot import HubError
from flora_train.runtime.manifest import BASE_RECORD
from flora_train.serving.catalogue import (
    VARIABLE,
    Catalogue,
    FolderSource,
    HubSource,
    SingleSource,
    choose,
    install,
    open_catalogue,
    open_source,
)
from tests.hub_server import ME, Hub, serve
from tests.hub_server.client import go_offline, use_hub


def adapter(folder: Path, rank: int = 4, **options: object) -> Path:
    folder.mkdir(parents=True)
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": 1, **options}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    (folder / "adapter_model.safetensors").write_bytes(b"tensors of " + folder.name.encode())
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    for name in ("lua-lora", "perl-ia3", "a b=c"):
        adapter(root / name)
    (root / "empty").mkdir()
    adapter(root / ".hidden")
    adapter(tmp_path / "outside")
    return root


def test_a_folder_lists_its_adapters(folder: Path) -> None:
    source = open_source(str(folder), "run")
    assert isinstance(source, FolderSource)
    assert source.names() == ["a b=c", "lua-lora", "perl-ia3"]
    assert source.fetch("lua-lora") == folder / "lua-lora"


def test_a_run_folder_lists_its_adapters_also_before_there_are_any(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("run.json", "config.yaml"):
        (run / name).write_text("{}")
    source = open_source(str(run), "run")
    assert source.names() == []
    adapter(run / "adapters" / "lua-lora")
    assert source.names() == ["lua-lora"]
    assert source.pinned() == str(run / "adapters")


def test_the_folder_of_one_adapter_has_its_name(folder: Path) -> None:
    source = open_source(str(folder / "lua-lora"), "run")
    assert isinstance(source, SingleSource)
    assert source.names() == ["lua-lora"]
    assert source.fetch("lua-lora") == folder / "lua-lora"


@pytest.mark.parametrize(
    "name",
    [
        *("..", ".", "../outside", "lua-lora/", "./lua-lora", "lua-lora/../perl-ia3", "/etc", ".hidden"),
        *("empty", "", " ", "a\0b", "LUA-LORA", "lua-lora\n", "%2e%2e/outside", "a" * 5000),
    ],
)
def test_no_name_leads_out_of_the_list(folder: Path, name: str) -> None:
    assert Catalogue([open_source(str(folder), "run")]).fetch(name) is None


def test_an_absolute_path_is_no_name(folder: Path) -> None:
    assert Catalogue([open_source(str(folder), "run")]).fetch(str(folder / "lua-lora")) is None


def test_names_that_no_request_can_carry_are_not_listed(folder: Path) -> None:
    try:
        os.mkdir(os.fsencode(folder) + b"/\xff")
    except OSError:
        pytest.skip("this file system has names in Unicode only")
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff")) / "adapter_config.json").write_text("{}")
    assert "\udcff" not in open_source(str(folder), "run").names()


def test_adapters_that_arrive_and_vanish_are_seen(folder: Path) -> None:
    catalogue = Catalogue([open_source(str(folder), "run")])
    assert catalogue.fetch("new") is None
    adapter(folder / "new")
    assert catalogue.fetch("new") == folder / "new"
    (folder / "new").rename(folder.parent / "moved")
    assert catalogue.fetch("new") is None


def test_a_name_in_two_sources_is_ambiguous(folder: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "other" / "lua-lora")
    adapter(tmp_path / "other" / "go-lora")
    catalogue = open_catalogue(os.pathsep.join([str(folder), str(tmp_path / "other")]))
    assert catalogue.names() == ["a b=c", "go-lora", "lua-lora", "perl-ia3"]
    assert catalogue.fetch("go-lora") == tmp_path / "other" / "go-lora"
    with pytest.raises(UserError, match="is ambiguous"):
        catalogue.fetch("lua-lora")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "there is no such folder"),
        ("./me/adapters", "there is no such folder"),
        ("/me/adapters", "there is no such folder"),
        ("tests/adapters", "there is no such folder"),
        ("me/adapters/lua", "there is no such folder"),
        ("README.md", "is a file"),
        ("docs", "is neither a run folder nor a folder of adapters"),
        ("", "is neither a run folder nor a folder of adapters"),
        ("a\0b", "there is no such folder"),
    ],
)
def test_other_sources_are_refused(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(source, "run")


def routed(folder: Path) -> Path:
    """The files of a routed adapter, whose parts are adapters of their own."""
    for part in ("expert_0", "expert_1"):
        adapter(folder / part)
    (folder / "routing.json").write_text("{}")
    return folder


def test_the_parts_of_a_routed_adapter_are_not_served_as_adapters(tmp_path: Path, folder: Path) -> None:
    path = routed(tmp_path / "all" / "lua-mix")
    with pytest.raises(UserError, match=r"is a routed adapter \(routing\.json\), and vLLM has no router"):
        open_source(str(path), "run")
    with pytest.raises(UserError, match="has routed adapters only; each is a routed adapter"):
        open_source(str(tmp_path / "all"), "run")
    routed(folder / "perl-mix")
    assert open_source(str(folder), "run").names() == ["a b=c", "lua-lora", "perl-ia3"]


def test_an_empty_catalogue_is_refused() -> None:
    with pytest.raises(UserError, match="names no source"):
        open_catalogue(os.pathsep)


def test_a_wrong_variable_is_an_error_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    install()
    monkeypatch.setenv(VARIABLE, "./nowhere")
    with pytest.raises(UserError, match=f"{VARIABLE} = './nowhere': there is no such folder"):
        install()


def test_unknown_names_get_a_suggestion(folder: Path) -> None:
    source = open_source(str(folder), "run")
    assert choose(source, []) == source.names()
    assert choose(source, ["perl-ia3", "perl-ia3"]) == ["perl-ia3"]
    with pytest.raises(UserError, match="Did you mean 'lua-lora'"):
        choose(source, ["lua-lorra"])


def test_ranks_are_those_of_the_configuration(folder: Path) -> None:
    source = open_source(str(folder), "run")
    adapter(folder / "pattern", rank=2, rank_pattern={"q_proj": 24})
    (folder / "damaged").mkdir()
    (folder / "damaged" / "adapter_config.json").write_text("{")
    assert [source.rank(name) for name in ("lua-lora", "pattern", "damaged")] == [4, 24, 1]


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    repository = tmp_path / "repository"
    adapter(repository / "lua-lora", rank=8)
    adapter(repository / "deep" / "inside")
    (repository / "lua-lora" / BASE_RECORD).write_text("{}")
    (repository / "report.html").write_text("report")
    (repository / "flora_train.json").write_text(json.dumps({"adapters": {"lua-lora": {"rank": 6}}}))
    with serve() as hub:
        hub.add_folder(f"{ME}/code", repository)
        hub.add_folder(f"{ME}/code-perl-ia3", folder / "perl-ia3")
        use_hub(monkeypatch, hub, tmp_path / "hub_cache")
        yield hub


def test_a_repository_lists_its_adapters_and_downloads_one(hub: Hub) -> None:
    source = open_source(f"{ME}/code", "run")
    assert isinstance(source, HubSource)
    assert not hub.asked
    assert source.names() == ["lua-lora"]
    assert source.rank("lua-lora") == 6
    assert not [path for _, path in hub.asked if "adapter_model" in path]
    folder = source.fetch("lua-lora")
    files = ["adapter_config.json", "adapter_model.safetensors", BASE_RECORD]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert not [path for _, path in hub.asked if "report" in path or "inside" in path]


def test_a_repository_of_one_adapter_has_the_name_of_its_manifest(hub: Hub, folder: Path) -> None:
    repository = f"{ME}/code-perl-ia3"
    assert HubSource(repository, repository).names() == ["code-perl-ia3"]
    (folder / "perl-ia3" / "flora_train.json").write_text(json.dumps({"adapters": {"perl-ia3": {}}}))
    source = HubSource(repository, repository, hub.repos[repository].head)
    assert source.names() == ["perl-ia3"]
    assert source.rank("perl-ia3") == 4


def test_a_repository_of_a_routed_adapter_has_no_adapters(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add_folder(f"{ME}/mix", routed(tmp_path / "mix"))
    assert open_source(f"{ME}/mix", "run").names() == []
    assert "mix is a routed adapter (routing.json), and vLLM has no router" in caplog.text


def test_the_commit_of_the_first_access_is_served(hub: Hub, tmp_path: Path) -> None:
    source = open_source(f"{ME}/code", "run")
    commit = hub.repos[f"{ME}/code"].head
    assert source.pinned() == f"{ME}/code@{commit}"
    adapter(tmp_path / "changed" / "go-lora")
    hub.add_folder(f"{ME}/code", tmp_path / "changed")
    assert source.names() == ["lua-lora"]
    assert source.fetch("lua-lora").parent.name == commit
    pinned = open_source(source.pinned(), "run")
    assert pinned.names() == ["lua-lora"]


def test_a_missing_repository_and_a_missing_network_are_said(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError):
        open_source(f"{ME}/nothing", "run").names()
    go_offline(monkeypatch)
    with pytest.raises(HubError, match="is not in the local cache"):
        open_source(f"{ME}/code", "run").names()
