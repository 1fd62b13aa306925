"""What is missing at the hub: network, login, terms, repositories."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch

from flora_train.data.hub_commits import HUB_PREFIX
from flora_train.prerequisites.cache import not_cached
from flora_train.prerequisites.findings import Findings, enumerate_names
from flora_train.prerequisites.needs import Need
from flora_train.runtime.hub_probe import (
    UNLIKE_A_HUB,
    Access,
    Answer,
    Repository,
    check_settings,
    endpoint,
    go_offline,
    has_token,
    probe,
    proxy,
    shown_url,
)
from flora_train.runtime.hub_snapshot import is_offline

KNOWN_GATED = (
    "bigcode/starcoder",
    "bigcode/starcoderbase*",
    "bigcode/starcoderplus",
    "bigcode/the-stack*",
    "meta-llama/*",
)
"""Repositories whose terms have to be accepted, for messages without a network."""
PUBLIC_HUB = "https://huggingface.co"


def check_hub(needs: Sequence[Need], findings: Findings) -> dict[Repository, Answer]:
    """Find out what of the hub cannot be read. Returns the hub's answers."""
    check_settings()
    if not needs:
        return {}
    missing = [rest for need in needs if (rest := not_cached(need)) is not None]
    names = {need.repository for need in missing}
    cached = [need.repository.name for need in needs if need.repository not in names]
    if is_offline():
        _check_cache(missing, cached, findings)
        return {}
    answers = probe([need.repository for need in missing or needs[:1]])
    first = next(iter(answers.values()))
    if first.access == "unreachable" and not missing:
        go_offline()
        findings.notes.append(
            f"{_host()} cannot be reached ({first.reason}): all that the run needs from it is in its cache"
        )
        return {}
    if len(answers) > 1 and all(answer.reason == UNLIKE_A_HUB for answer in answers.values()):
        first = replace(first, access="not a hub", reason="it answers 404 to every question")
    if first.access in ("unreachable", "not a hub"):
        _add_unreachable(first, missing, cached, findings)
        _add_unchecked_login(missing, findings)
        return {}
    findings.rows.append(("hub", f"{_host()} answers"))
    _check_answers(missing, answers, findings)
    return answers


def _host() -> str:
    return shown_url(endpoint()).partition("://")[2] or shown_url(endpoint())


def _check_cache(missing: Sequence[Need], cached: Sequence[str], findings: Findings) -> None:
    """With HF_HUB_OFFLINE=1: add a problem for every repository that is not in the cache."""
    for need in missing:
        hint = "is not in the local cache, and HF_HUB_OFFLINE forbids access to the hub: unset it"
        if need.keys[0] == "model.path":
            hint = (
                "is neither a local folder nor in the hub's cache, and HF_HUB_OFFLINE=1 forbids a download: "
                "give a local folder, or unset HF_HUB_OFFLINE"
            )
        elif need.keys[0] == "contenders" or need.keys[0].endswith((".init_from", ".over")):
            hint = f"is not a PEFT adapter's folder here, {hint.removeprefix('is ')}"
        elif need.folders[0]:
            hint = f"{need.folders[0]} of it {hint}"
        _add_for_name(need, hint, findings)
        findings.suggests_smaller = True
    if cached:
        findings.rows.append(("cache", f"has {enumerate_names(cached)}"))
        if missing:
            findings.notes.append(f"in the hub's cache: {enumerate_names(cached)}")


def _add_for_name(need: Need, hint: str, findings: Findings) -> None:
    """Add a problem of the key that names a repository."""
    if len(need.keys) > 1:
        hint += f" (as for {len(need.keys) - 1} other keys)"
    if need.fallback_hint:
        hint += f". Instead, use {need.fallback_hint}"
    key, value = need.keys[0], need.repository.name
    if key == "evaluation.problems":
        value = HUB_PREFIX + value
    findings.add(key, value, hint)
    findings.lacks_base |= key == "model.path"


def _add_unreachable(
    answer: Answer, missing: Sequence[Need], cached: Sequence[str], findings: Findings
) -> None:
    names = enumerate_names([need.described for need in missing])
    through = proxy()
    via = "" if through is None else f" through the proxy {through}"
    state = f"cannot be reached{via} ({answer.reason})"
    if answer.reason.startswith("no answer"):
        state += ", HF_HUB_ETAG_TIMEOUT=20 waits longer"
    if answer.access == "not a hub":
        state = f"does not answer as the hub{via}: {answer.reason}"
    ways = ["connect this machine"]
    ways.append("correct HF_ENDPOINT" if _has_own_endpoint() else "set HF_ENDPOINT to a mirror")
    ways.append("set HTTPS_PROXY to a proxy" if through is None else "correct the proxy")
    hint = (
        f"{_host()} {state}, and the run needs {names} from there: {', '.join(ways)}, or fill the cache "
        "(HF_HOME) by a run where there is a network, copy it here, and set HF_HUB_OFFLINE=1"
    )
    if cached:
        hint += f" (in the cache: {enumerate_names(cached)})"
    findings.add("network", None, hint, suggests_smaller=True)
    findings.lacks_base |= _name_base(missing)
    findings.rows.append(("hub", f"{_host()} {state}"))


def _name_base(needs: Sequence[Need]) -> bool:
    """Whether the base model is among what is needed."""
    return any(need.keys[0] == "model.path" for need in needs)


def _has_own_endpoint() -> bool:
    return bool(os.environ.get("HF_ENDPOINT")) and endpoint() != PUBLIC_HUB


def _add_unchecked_login(missing: Sequence[Need], findings: Findings) -> None:
    """Without a network, terms cannot be checked; a missing token is known."""
    gated = [need for need in missing if any(fnmatch(need.repository.name, name) for name in KNOWN_GATED)]
    if not gated or has_token():
        return
    names = enumerate_names([need.repository.name for need in gated])
    hint = f"no token is on this machine, and {names} cannot be read without one: {_how_to_accept(gated)}"
    findings.add("login", None, hint, suggests_smaller=True)
    findings.rows.append(("hub login", "no token"))


def _how_to_accept(needs: Sequence[Need]) -> str:
    pages = enumerate_names([_page(need.repository) for need in needs])
    return f"accept the terms on {pages}, then run `hf auth login` (or set HF_TOKEN)"


def _page(repository: Repository) -> str:
    return f"{shown_url(endpoint())}/{repository.page}"


def _check_answers(needs: Sequence[Need], answers: Mapping[Repository, Answer], findings: Findings) -> None:
    """Add a problem for every kind of refusal."""
    groups: dict[Access, list[Need]] = {}
    for need in needs:
        access = answers[need.repository].access
        findings.rows.append((need.repository.type, f"{need.described}: {ROWS.get(access, access)}"))
        groups.setdefault(access, []).append(need)
    for access, group in groups.items():
        reason = answers[group[0].repository].reason
        if access == "busy":
            findings.notes.append(f"the hub is slow or busy ({reason}): requests are repeated for some time")
        elif access in ("login", "token", "terms"):
            key, hint = _login_hint(access, group, reason)
            findings.add(key, None, hint, suggests_smaller=True)
            findings.lacks_base |= _name_base(group)
        elif access != "ok":
            for need in group:
                _add_refused(need, answers[need.repository], findings)


def _login_hint(access: Access, needs: Sequence[Need], reason: str) -> tuple[str, str]:
    """(key, hint) of the problem of repositories that need another login."""
    described = enumerate_names([need.described for need in needs])
    if access == "token":
        page = f"{shown_url(endpoint())}/settings/tokens"
        return "login", (
            f"the token of this machine is refused ({reason or 'it answered 401'}): create one on "
            f"{page}, then run `hf auth login` (or set HF_TOKEN)"
        )
    if access == "terms":
        pages = enumerate_names([_page(need.repository) for need in needs])
        return "terms", (
            f"this token may not read {described} ({reason}): accept the terms on {pages} with the account "
            "of the token (hf auth whoami)"
        )
    gated = "is gated" if len(needs) == 1 else "are gated"
    return "login", f"{described} {gated}, and no token is on this machine: {_how_to_accept(needs)}"


ROWS = {
    "ok": "can be read",
    "login": "gated: needs a login",
    "token": "the token is refused",
    "terms": "gated: the terms are not accepted",
    "hidden": "private, or there is none",
    "missing": "there is none",
    "revision": "no such revision",
    "busy": "not known: the hub is slow or busy",
}
"""Access -> state in a row of `flora-train doctor`."""


def _add_refused(need: Need, answer: Answer, findings: Findings) -> None:
    """Add a problem for a repository that does not exist or cannot be read."""
    repository = need.repository
    kind = "model" if repository.type == "model" else "data set"
    if answer.access == "revision":
        hint = f"{repository.name} has no such branch, tag or commit"
        findings.add(_revision_key(need.keys[0]), repository.revision, hint)
        findings.lacks_base |= _name_base([need])
        return
    hint = f"there is no such {kind} on {_host()}, and no such folder here: check the name"
    if answer.reason == UNLIKE_A_HUB:
        hint += f", and HF_ENDPOINT ({answer.reason})"
    if answer.access == "hidden":
        hint = (
            f"there is no such {kind} on {_host()}, or it is private: check the name, or run `hf auth login`"
        )
    elif answer.access == "refused":
        hint = (
            f"{_host()} refuses to show it ({answer.reason}): a fine-grained token needs the permission to "
            "read gated repositories, and a network may filter the hub"
        )
    _add_for_name(need, hint, findings)


def _revision_key(key: str) -> str:
    """The key beside the one that names a repository."""
    section, _, last = key.rpartition(".")
    if last in ("path", "hub"):
        return f"{section}.revision"
    return key
