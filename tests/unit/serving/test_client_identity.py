"""Clients in request ids: no key can be read, and no client can name another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_train.config.errors import UserError
from flora_train.serving import client_identity
from flora_train.serving.client_identity import client_of_hash, key_hash, mark, marked_client, secret

SECRET, OTHER_SECRET = b"s" * 32, b"t" * 32
KEY = "sk-0123456789"
CLIENT = client_of_hash(key_hash(KEY), SECRET)


@given(st.text(max_size=40), st.integers(0, 99))
def test_a_marked_id_names_its_client_and_not_the_key(request_id: str, sample: int) -> None:
    marked = mark(request_id, CLIENT, SECRET)
    assert marked.endswith(request_id)
    assert marked_client(marked, SECRET) == CLIENT
    # as vLLM names further samples of one request, and with its random ending
    assert marked_client(f"{sample}_{marked}-1a2b3c4d", SECRET) == CLIENT
    assert KEY not in marked.removesuffix(request_id)
    assert key_hash(KEY)[:8] not in marked.removesuffix(request_id)


def test_one_key_is_one_client_and_two_are_two() -> None:
    assert client_of_hash(key_hash(KEY), SECRET) == CLIENT
    assert client_of_hash(key_hash("another"), SECRET) != CLIENT
    assert client_of_hash(key_hash(KEY), OTHER_SECRET) != CLIENT


@given(st.from_regex(r"(\d{1,2}_)?fair-[0-9a-f]{32}-[0-9a-f]{16}-x", fullmatch=True))
def test_a_forged_id_names_nobody(forged: str) -> None:
    assert marked_client(forged, SECRET) is None


@pytest.mark.parametrize("before", ["", "0_", "12_", "1_2_"])
def test_a_copied_id_names_nobody_once_it_went_through_the_server(before: str) -> None:
    copied = before + mark("r", CLIENT, SECRET)
    assert marked_client(mark(copied, None, SECRET), SECRET) is None
    other = client_of_hash(key_hash("another"), SECRET)
    assert marked_client(mark(copied, other, SECRET), SECRET) == other


def test_ids_without_a_client_stay_as_they_are() -> None:
    for request_id in ("cmpl-1-0-ab", "0", "chatcmpl-fair-1", "fairy-1"):
        assert mark(request_id, None, SECRET) == request_id
        assert marked_client(request_id, SECRET) is None


def test_the_secret_is_created_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(client_identity.SECRET_VARIABLE, "")
    client_identity.create_secret()
    created = secret()
    client_identity.create_secret()
    assert secret() == created
    assert len(created) == 64


@pytest.mark.parametrize("value", ["", "hunter2"])
def test_a_missing_or_short_secret_is_an_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(client_identity.SECRET_VARIABLE, value)
    with pytest.raises(UserError, match="is missing or shorter than 16 characters") as caught:
        secret()
    assert value == "" or value not in str(caught.value)
