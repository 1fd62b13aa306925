"""The client's lines on retries are replaced by one line of the package, and other lines are kept."""

from __future__ import annotations

import logging

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import http_backoff

from flora_train.runtime.logging import init_logging, stop_logging
from tests.hub_server import Fault, serve

CLIENT = logging.getLogger("huggingface_hub.utils._http")


@pytest.fixture(autouse=True)
def _no_earlier_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flora_train.runtime.hub_retries._filter._mentioned_at", -1e9)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("log_to_stderr")
def test_several_retries_of_the_real_client_are_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with serve() as hub:
        hub.add_faults(Fault("503", "*", times=3, retry_after=None))
        http_backoff("GET", f"{hub.url}/_injected", base_wait_time=0.01)
        assert hub.injected["503"] == 3
    assert capfd.readouterr().err == "note: the hub answered 503: requests are repeated for some time\n"


@pytest.mark.usefixtures("log_to_stderr")
def test_a_long_wait_is_said_each_time(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        CLIENT.warning("Rate limited. Waiting 301.0s before retry [Retry 1/5].")
    CLIENT.warning("Retrying in 4s [Retry 3/5].")
    line = "note: the hub asks to wait: the next request follows in 301s\n"
    assert capfd.readouterr().err == 2 * line


@pytest.mark.usefixtures("log_to_stderr")
def test_signed_addresses_are_not_repeated(capfd: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("huggingface_hub.file_download").warning(
        "Error while downloading from %s: %s\nTrying to resume download...",
        "https://cdn/x?Signature=secret",
        "read https://cdn/x?Signature=secret",
    )
    said = capfd.readouterr().err
    assert said == "note: the hub closed the connection, or is slow: requests are repeated for some time\n"


def test_other_lines_of_the_client_pass_and_the_filter_can_be_removed() -> None:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    CLIENT.addHandler(handler)
    try:
        init_logging()
        CLIENT.warning("another warning")
        CLIENT.warning("'x' thrown while requesting GET y")
        stop_logging()
        CLIENT.warning("Retrying in 1s [Retry 1/5].")
    finally:
        CLIENT.removeHandler(handler)
    assert records == ["another warning", "Retrying in 1s [Retry 1/5]."]
