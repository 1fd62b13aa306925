"""Which node is which client: names that are shared, missing or late, and messages that do not arrive."""

from __future__ import annotations

import logging

import pytest
from flwr.app import RecordDict

from flora_train.config.errors import UserError
from flora_train.federated.flower.nodes import IDENTIFY_SECONDS, TRAIN, WHO, Nodes
from tests.flower.clock import Clock
from tests.flower.network import Network, nameless, node_of


def identified(network: Network, *clients: str) -> Nodes:
    """The nodes of a network that have said who they are."""
    own = Nodes(network, clients)
    own.identify()
    own.identify()
    return own


def test_a_node_that_shares_a_name_and_leaves_gives_it_back(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    network = Network()
    network.nodes[1] = node_of("a")
    own = identified(network, "a")
    assert own.online() == {"a": 1}
    network.nodes[2] = node_of("a")
    own.identify()
    own.identify()
    assert own.online() == {"a": 2}
    del network.nodes[2]
    assert own.online() == {"a": 1}
    assert "client a has node 2 now, and had 1" in caplog.text
    assert "client a has node 1 now, and had 2" in caplog.text


def test_a_node_without_a_name_is_asked_again_after_a_while(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    network = Network()
    network.nodes[1] = nameless
    own = identified(network, "a")
    for _ in range(20):
        own.identify()
    assert network.asked == [(1, WHO)]
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    text = record.getMessage()
    assert "node 1 does not say which client it is: node-config: no" in text
    assert text.isprintable()
    assert len(text) < 500
    clock.now += IDENTIFY_SECONDS + 1
    network.nodes[1] = node_of("a")
    own.identify()
    own.identify()
    assert network.asked == [(1, WHO)] * 2
    assert own.online() == {"a": 1}


def test_only_clients_of_the_round_are_waited_for(clock: Clock) -> None:
    network = Network()
    network.nodes[1] = node_of("a")
    own = identified(network, "a", "b", "c")
    begun = clock.now
    assert not own.wait_for(["b", "c"], 1, 30.0)
    assert 30.0 <= clock.now - begun < 40.0
    clock.at[clock.now + 10.0] = lambda: network.nodes.update({2: node_of("c")})
    begun = clock.now
    assert own.wait_for(["b", "c"], 1, 30.0)
    assert 10.0 <= clock.now - begun < 15.0


def test_the_first_round_needs_as_many_clients_as_a_round_has(clock: Clock) -> None:
    network = Network()
    network.nodes[1] = node_of("a")
    own = identified(network, "a", "b", "c")
    with pytest.raises(UserError, match="only 1 of the 2 clients of a round were connected in 30 s"):
        own.wait_for_first(["a", "b"], 30.0)
    network.nodes[3] = node_of("c")
    begun = clock.now
    own.wait_for_first(["a", "b"], 30.0)  # b may return, and then c is enough to begin
    assert clock.now - begun >= 30.0


def test_a_message_that_flower_does_not_take_is_not_sent(clock: Clock) -> None:
    network = Network()
    network.nodes = {1: node_of("a", lambda message: RecordDict()), 2: node_of("b")}
    network.refused = {2}
    own = identified(network, "a", "b")
    replies = own.ask({"a": (1, RecordDict()), "b": (2, RecordDict())}, round_number=0, timeout=60.0)
    assert replies.sent == {"a"}
    assert replies.contents.keys() == {"a"}
    assert replies.silent == {"b": "its node left before the round"}
    assert (2, TRAIN) in network.asked


def test_an_answer_that_flower_cannot_read_takes_no_other_with_it(clock: Clock) -> None:
    def unreadable(message: object) -> RecordDict:
        raise TypeError("Invalid arguments for Array")

    network = Network()
    network.nodes = {1: node_of("a", unreadable), 2: node_of("b", lambda message: RecordDict())}
    own = identified(network, "a", "b")
    replies = own.ask({"a": (1, RecordDict()), "b": (2, RecordDict())}, round_number=0, timeout=60.0)
    assert replies.errors == {"a": "its answer cannot be read (TypeError)"}
    assert replies.contents.keys() == {"b"}
