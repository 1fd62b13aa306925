"""Nodes in this process instead of Flower's network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from flora_train.federated.flower.nodes import CLIENT, WHO
from flora_train.federated.flower.records import ERROR, FACTS

Answering = Callable[[Message], RecordDict | Error | None]
"""What a node answers to a message; None: nothing yet. An exception is one of the program that reads it."""


class Network(Grid):  # type: ignore[misc]
    """Who is connected, and what each node answers."""

    def __init__(self) -> None:
        self.nodes: dict[int, Answering] = {}
        self.refused: set[int] = set()
        """Nodes that are listed, and whose messages are not taken."""
        self.asked: list[tuple[int, str]] = []
        """(node, type) of every message."""
        self._messages: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[Any]:
        names: list[str | None] = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.asked.append((node, message.metadata.message_type))
            name = None
            if node not in self.refused or message.metadata.message_type == WHO:
                name = f"message {len(self.asked)}"
                self._messages[name] = message
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for name in message_ids:
            message = self._messages[name]
            node = self.nodes.get(message.metadata.dst_node_id)
            answer = None if node is None else node(message)
            if answer is not None:
                replies.append(Message(answer, reply_to=message))
        return replies

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **options: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Any:
        raise NotImplementedError


def node_of(client: str, train: Answering = lambda message: None) -> Answering:
    """A node that states this name. train: what it answers in a round."""

    def answer(message: Message) -> RecordDict | Error | None:
        if message.metadata.message_type == WHO:
            return RecordDict({FACTS: ConfigRecord({CLIENT: client})})
        return train(message)

    return answer


def nameless(message: Message) -> RecordDict:
    """A node whose configuration does not say which client it is."""
    return RecordDict({FACTS: ConfigRecord({CLIENT: "", ERROR: "node-config: no\x1b[31m name\n" * 100})})
