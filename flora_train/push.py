"""flora-train push: a run's adapters on the Hugging Face hub, with their cards and the report, in one commit or a repository each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from pydantic import Field

from flora_train.adapters.spec import AdapterSpec, expand
from flora_train.config.errors import UserError, choices, did_you_mean, fail, first_line
from flora_train.config.options import read_options
from flora_train.config.schema import RunConfig
from flora_train.config.section import Section, Text
from flora_train.config.terminal_text import print_plain
from flora_train.config.words import from_flags, parse_words, run_and_names
from flora_train.export.repository import MANIFEST, Entries, Repository, stage
from flora_train.run import read_report
from flora_train.session import check_base
from flora_train.training.distributed import say
from flora_train.training.origin import OriginOptions
from flora_train.training.progress import Watch
from flora_train.training.run_folder import RunFolder, open_run

ATTEMPTS = 6
PASSING = (429, 500, 502, 503, 504)
"""Answers of the hub that another time may not be given."""
LOCALLY = "or use the folders as they are: plain peft loads them"

Result = TypeVar("Result")


class PushOptions(Section):
    repo: Text = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """ORG/NAME (or YOU/NAME) on the hub."""
    repo_per_adapter: bool = False
    """A repository ORG/NAME-ADAPTER for each, and a collection NAME, instead of one repository with a folder for each."""
    base: Text | None = None
    """What the adapters call their base model on the hub. Default: what the recipe called it."""
    public: bool = False
    """Visible to everybody. Default: private."""
    pause: float = Field(1.0, ge=0, le=86_400)
    """Seconds between two repositories: the hub limits how fast they are created."""
    dry_run: bool = False
    """Say what would be created, and ask the hub nothing."""
    allow_different_base: bool = False
    """Push though the base at model.path is not the one that the run was trained on. The cards say so."""


def push_run(words: Sequence[str]) -> None:
    """words: a run, names of adapters (none: all), and PushOptions. What is there already is not sent again, so that a push that broke off is
    finished by another. Raises UserError."""
    alone, raw = from_flags(words, switches=("repo_per_adapter", "public", "dry_run", "allow_different_base"))
    run, names = run_and_names(alone)
    options = read_options(PushOptions, parse_words(raw))
    folder, config = open_run(run)
    specs = {spec.name: spec for spec in expand(config)}
    for name in names:
        if name not in specs:
            raise fail("adapter", name, f"there are {choices(specs)}.{did_you_mean(name, specs)}")
    names = names or list(specs)
    folder.share()
    try:
        _push(folder, config, [specs[name] for name in names], options)
    finally:
        folder.unlock()


def _push(folder: RunFolder, config: RunConfig, chosen: Sequence[AdapterSpec], options: PushOptions) -> None:
    """Stage and send, while no other process trains in the folder."""
    run = str(folder.path)
    if not folder.finished:
        raise fail("run", run, "is not finished: it trains still, or goes on with resume=true")
    if missing := [spec.name for spec in chosen if not (folder.adapters / spec.name).is_dir()]:
        raise fail("run", run, f"has no folder of {missing[0]}: flora-train export {run} writes it")
    report = read_report(folder) if (folder.evaluation / "report.json").exists() else {}
    differences = check_base(folder, config, OriginOptions(allow_different_base=options.allow_different_base))
    origin = " ".join(differences)
    with TemporaryDirectory() as place:
        repositories = stage(folder, chosen, report, options.repo, options.base, options.repo_per_adapter, Path(place), origin)
        base = options.base or config.model.path
        if Path(base).exists():
            say(
                f"note: the adapters call their base {base}, which is a folder of this machine: --base ORG/MODEL names it on the hub"
            )
        if options.dry_run:
            _show(repositories, options)
            return
        _send(repositories, options)


def _show(repositories: Sequence[Repository], options: PushOptions) -> None:
    """What would be created."""
    for repository in repositories:
        sizes = {path: file.stat().st_size for path, file in repository.files.items()}
        sizes |= {path: len(content) for path, content in repository.overview({}).items()}
        print_plain(f"{repository.name}  {'public' if options.public else 'private'}, {sum(sizes.values()) / 1e6:.1f} MB")
        for path, size in sizes.items():
            print_plain(f"  {path}  {size:,} bytes")
    if options.repo_per_adapter:
        print_plain(f"collection {options.repo}  {len(repositories)} items")


def _send(repositories: Sequence[Repository], options: PushOptions) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api, repo, me = HfApi(library_name="flora_train"), options.repo, ""
    try:
        me = insist(api.whoami)["name"]
        with Watch("push", len(repositories)) as watch:
            for done, repository in enumerate(repositories, start=1):
                print_plain(_create(api, repository, options))
                watch.update(done)
                if done < len(repositories):
                    time.sleep(options.pause)
        if options.repo_per_adapter:
            print_plain(_collect(api, repositories, options))
    except LocalTokenNotFoundError as error:
        raise fail("repo", repo, f"needs you to be logged in: hf auth login, or HF_TOKEN=...; {LOCALLY}") from error
    except OfflineModeIsEnabled as error:
        raise fail("repo", repo, f"cannot be reached, HF_HUB_OFFLINE=1 forbids it: unset it, {LOCALLY}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"the hub answered {status}: {first_line(error)}; what it has stays, push again"
        if status == 401:
            reason = "the hub does not know your token: hf auth login"
        if status == 403:
            reason = f"may not be written by you ({me})"
        raise fail("repo", repo, f"{reason}, {LOCALLY}") from error
    except OSError as error:
        raise fail("repo", repo, f"broke off ({first_line(error)}); what the hub has stays: push again, {LOCALLY}") from error


def _create(api: Any, repository: Repository, options: PushOptions) -> str:
    """Create it if it is not there and commit what it lacks; returns its address."""
    from huggingface_hub import CommitOperationAdd

    theirs = _adapters_there(api, repository)
    if others := {entry.get("base", repository.base) for entry in theirs.values()} - {repository.base}:
        raise fail("repo", repository.name, f"holds adapters for another base, {others.pop()}: choose another repository")
    for name, mine in repository.adapters.items():
        if theirs.get(name, mine)["run"] != mine["run"]:
            fix = f"has an adapter {name} of another run: choose another repository, or rename the task or adapter"
            raise fail("repo", repository.name, fix)
    address = insist(lambda: api.create_repo(repository.name, private=not options.public, exist_ok=True))
    files: dict[str, Path | bytes] = {**repository.files, **repository.overview(theirs)}

    def commit() -> Any:
        operations = [CommitOperationAdd(path, file) for path, file in files.items()]
        return api.create_commit(
            repository.name, operations, commit_message=f"Adapters of flora_train: {', '.join(repository.adapters)}"[:200]
        )

    insist(commit)
    return str(address)


def _adapters_there(api: Any, repository: Repository) -> Entries:
    """What was pushed there before. Raises UserError for a repository that holds something else."""
    if not insist(lambda: api.repo_exists(repository.name)):
        return {}
    files = set(insist(lambda: api.list_repo_files(repository.name))) - {".gitattributes"}
    if MANIFEST in files:
        file = insist(lambda: api.hf_hub_download(repository.name, MANIFEST))
        found: Entries = json.loads(Path(file).read_text(encoding="utf-8"))["adapters"]
        if not all(isinstance(entry, dict) and "run" in entry for entry in found.values()):
            raise fail(
                "repo",
                repository.name,
                f"has a {MANIFEST} of another version: choose another repository, or delete that file there",
            )
        return found
    if files:
        raise fail("repo", repository.name, f"exists, and holds something else ({min(files)}): choose another name")
    return {}


def _collect(api: Any, repositories: Sequence[Repository], options: PushOptions) -> str:
    owner, _, name = options.repo.partition("/")
    collection = insist(lambda: api.create_collection(name, namespace=owner, private=not options.public, exists_ok=True))
    for repository in repositories:
        insist(lambda item=repository.name: api.add_collection_item(collection.slug, item, "model", exists_ok=True))  # type: ignore[misc]
    return str(collection.url)


def insist(action: Callable[[], Result]) -> Result:
    """Do it, again where the hub is busy or the line breaks, each time after twice as long or as long as the hub says."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    for attempt in range(ATTEMPTS):
        wait = 2.0**attempt
        try:
            return action()
        except (LocalTokenNotFoundError, OfflineModeIsEnabled, UserError):
            raise
        except HfHubHTTPError as error:
            if error.response.status_code not in PASSING or attempt == ATTEMPTS - 1:
                raise
            reason = f"the hub answered {error.response.status_code}"
            wait = float(error.response.headers.get("Retry-After", wait))
        except Exception as error:
            if not _line_broke(error):
                raise
            if attempt == ATTEMPTS - 1 or isinstance(error, RuntimeError):
                raise OSError(first_line(error)) from error
            reason = first_line(error)
        say(f"note: {reason}; trying again in {wait:g}s")
        time.sleep(wait)
    raise AssertionError


def _line_broke(error: Exception) -> bool:
    """By name: which HTTP library the hub's client is made with changes with its version. A RuntimeError is an upload that its own attempts
    did not finish."""
    return isinstance(error, (ConnectionError, RuntimeError)) or any(
        kind.__name__ == "TransportError" for kind in type(error).__mro__
    )
