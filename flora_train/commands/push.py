"""flora-train push: a run's adapters on the Hugging Face hub, with their cards and the report, in one commit or a repository each."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import Field

from flora_train.adapters.spec import AdapterSpec, expand
from flora_train.config.base import ConfigModel, Text
from flora_train.config.command_options import read_options
from flora_train.config.errors import choices, did_you_mean, first_line, user_error
from flora_train.config.schema import RunConfig
from flora_train.config.terminal_text import print_plain
from flora_train.evaluation.report.files import read_report_if_any
from flora_train.export.hub_client import AnswerError, check_repository_name, with_retries
from flora_train.export.hub_repository import MANIFEST, Entries, Repository, Staging, read_entries, stage
from flora_train.run_context import check_base
from flora_train.runtime.atomic import disk_errors
from flora_train.runtime.progress import ProgressBar
from flora_train.runtime.run_folder import RunFolder, open_run
from flora_train.training.origin import OriginOptions

logger = logging.getLogger(__name__)

LOCALLY = "or use the folders as they are: plain peft loads them"


class PushOptions(ConfigModel):
    repo: Text
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


def push_run(run: str, names: Sequence[str] = (), **values: object) -> None:
    """Put adapters of a run (default: all) on the hub. values: PushOptions.

    What is there already is not sent again, so that a second call finishes what the first left. Raises UserError.
    """
    options = read_options(PushOptions, values)
    folder, config = open_run(run)
    specs = {spec.name: spec for spec in expand(config)}
    check_repository_name(options.repo)
    if options.base is not None and "/" in options.base and not Path(options.base).exists():
        check_repository_name(options.base, "base")
    for name in names:
        if name not in specs:
            raise user_error("adapter", name, f"there are {choices(specs)}.{did_you_mean(name, specs)}")
    names = list(dict.fromkeys(names)) or list(specs)
    for name in names if options.repo_per_adapter else ():
        check_repository_name(f"{options.repo}-{name}", f"repo_per_adapter: {name}")
    folder.share()
    try:
        _push(folder, config, [specs[name] for name in names], options)
    finally:
        folder.unlock()


def _push(folder: RunFolder, config: RunConfig, chosen: Sequence[AdapterSpec], options: PushOptions) -> None:
    """Stage and send, while no other process trains in the folder."""
    run = str(folder.path)
    if not folder.finished:
        raise user_error("run", run, "is not finished: it trains still, or goes on with resume=true")
    if missing := [spec.name for spec in chosen if not (folder.adapters / spec.name).is_dir()]:
        raise user_error("run", run, f"has no folder of {missing[0]}: flora-train export {run} writes it")
    report = read_report_if_any(folder)
    differences = check_base(folder, config, OriginOptions(allow_different_base=options.allow_different_base))
    origin = " ".join(differences)
    with _staging() as place:
        staging = Staging(options.repo, place, options.base, options.repo_per_adapter, origin, report)
        repositories = stage(folder, config, chosen, staging)
        base = options.base or config.model.path
        if Path(base).exists():
            logger.warning(
                f"the adapters call their base {base}, which is a folder of this machine: --base ORG/MODEL names it on the hub"
            )
        if options.dry_run:
            _show(repositories, options)
            return
        _send(repositories, options)


@contextmanager
def _staging() -> Iterator[Path]:
    """A temporary folder. Raises UserError where there is none."""
    with disk_errors(Path(os.environ.get("TMPDIR", "/tmp"))):
        folder = TemporaryDirectory()
    with folder as name:
        yield Path(name)


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
        me = with_retries(lambda: str(api.whoami()["name"]))
        for repository in repositories:  # before anything is sent
            private = _is_private(api, repository.name)
            check_visibility(repository.name, private, options.public)
            if private and options.public:
                logger.warning(
                    f"{repository.name} exists and stays private: its settings on the hub make it public, --public does not"
                )
        collection = _collection(api, options) if options.repo_per_adapter else None
        with ProgressBar("push", len(repositories)) as watch:
            for done, repository in enumerate(repositories, start=1):
                print_plain(_create(api, repository, options))
                watch.update(done)
                if done < len(repositories):
                    time.sleep(options.pause)
        if collection is not None:
            print_plain(_collect(api, collection, repositories))
    except LocalTokenNotFoundError as error:
        raise user_error("repo", repo, f"needs you to be logged in: hf auth login, or HF_TOKEN=...; {LOCALLY}") from error
    except OfflineModeIsEnabled as error:
        raise user_error("repo", repo, f"cannot be reached, HF_HUB_OFFLINE=1 forbids it: unset it, {LOCALLY}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"the hub answered {status}: {first_line(error)}; what it has stays, push again"
        if status == 401:
            reason = "the hub does not know your token: hf auth login"
        if status == 403:
            reason = f"may not be written by you ({me})"
        raise user_error("repo", repo, f"{reason}, {LOCALLY}") from error
    except AnswerError as error:
        reason = f"the hub gave an answer that makes no sense ({error}); what it has stays: push again"
        raise user_error("repo", repo, f"{reason}, {LOCALLY}") from error
    except OSError as error:
        raise user_error(
            "repo", repo, f"broke off ({first_line(error)}); what the hub has stays: push again, {LOCALLY}"
        ) from error


def _create(api: Any, repository: Repository, options: PushOptions) -> str:
    """Create it if it is not there and commit what it lacks; returns its address."""
    from huggingface_hub import CommitOperationAdd

    theirs = _adapters_there(api, repository)
    if others := {entry.base for entry in theirs.values()} - {repository.base}:
        raise user_error("repo", repository.name, f"holds adapters for another base, {others.pop()}: choose another repository")
    for name, mine in repository.adapters.items():
        if theirs.get(name, mine).run != mine.run:
            hint = f"has an adapter {name} of another run: choose another repository, or rename the task or adapter"
            raise user_error("repo", repository.name, hint)
    address = with_retries(lambda: str(api.create_repo(repository.name, private=not options.public, exist_ok=True)))
    check_visibility(repository.name, _is_private(api, repository.name), options.public)  # another may have been first
    files: dict[str, Path | bytes] = {**repository.files, **repository.overview(theirs)}

    def commit() -> Any:
        operations = [CommitOperationAdd(path, file) for path, file in files.items()]
        return api.create_commit(
            repository.name, operations, commit_message=f"Adapters of flora_train: {', '.join(repository.adapters)}"[:200]
        )

    with_retries(commit)
    return address


def _is_private(api: Any, name: str) -> bool | None:
    """None: there is no such repository."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def ask() -> bool | None:
        try:
            private = api.repo_info(name).private
        except GatedRepoError:  # everybody sees that it is there
            return False
        except RepositoryNotFoundError:
            return None
        if not isinstance(private, bool):
            raise TypeError(f"{name} is private: {private!r}")
        return private

    return with_retries(ask)


def check_visibility(name: str, private: bool | None, public: bool) -> None:
    """private: None where it is not there yet. Raises UserError if what is there is public and --public was not given."""
    if private is False and not public:
        raise user_error(
            "repo", name, "exists and is public: give --public to push for everybody to see, or choose another repository"
        )


def _adapters_there(api: Any, repository: Repository) -> Entries:
    """What was pushed there before. Raises UserError for a repository that holds something else."""
    if not with_retries(lambda: api.repo_exists(repository.name)):
        return {}
    files = with_retries(lambda: {str(file) for file in api.list_repo_files(repository.name)}) - {".gitattributes"}
    if MANIFEST in files:
        file = with_retries(lambda: Path(api.hf_hub_download(repository.name, MANIFEST)))
        try:
            return read_entries(file.read_bytes())
        except (ValueError, RecursionError) as error:
            hint = f"has a {MANIFEST} of another version: choose another repository, or delete that file there"
            raise user_error("repo", repository.name, hint) from error
    if files:
        raise user_error("repo", repository.name, f"exists, and holds something else ({min(files)}): choose another name")
    return {}


def _collection(api: Any, options: PushOptions) -> Any:
    """The collection of that name, made where it is not there. Raises UserError if it is public and --public was not given."""
    owner, _, name = options.repo.partition("/")
    collection = with_retries(lambda: api.create_collection(name, namespace=owner, private=not options.public, exists_ok=True))
    if not isinstance(collection.slug, str) or not isinstance(collection.private, bool | None):
        raise AnswerError(f"a collection {collection.slug!r}")
    if not collection.private and not options.public:
        raise user_error(
            "repo", options.repo, "the collection of this name exists and is public: give --public, or choose another name"
        )
    return collection


def _collect(api: Any, collection: Any, repositories: Sequence[Repository]) -> str:
    for repository in repositories:
        with_retries(lambda item=repository.name: api.add_collection_item(collection.slug, item, "model", exists_ok=True))  # type: ignore[misc]
    return str(collection.url)
