"""The nodes of a Flower run: which client each of them is, and what they answer in a round."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from flora_train.config.errors import user_error
from flora_train.federated.flower.records import facts_in
from flora_train.federated.remote import told

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
IDENTIFY_SECONDS = 120.0
"""Within which a node has to say which client it is; later it is asked again."""
WHO, TRAIN = "query.client", "train"
"""Types of messages: which client a node is, and its part of a round."""
CLIENT = "client"
"""The fact of the answer to WHO."""


@dataclass
class Replies:
    """What came of the messages of a round."""

    contents: dict[str, RecordDict] = field(default_factory=dict)
    """Client -> what it answered."""
    errors: dict[str, str] = field(default_factory=dict)
    """Client -> what its program failed with."""
    silent: dict[str, str] = field(default_factory=dict)
    """Client -> why there is no answer."""


@dataclass(frozen=True)
class _Asked:
    node: int
    until: float


class Nodes:
    """The nodes that are connected, by client.

    Args:
        grid: Of Flower.
        clients: All clients of the run.
    """

    def __init__(self, grid: Grid, clients: Collection[str]) -> None:
        self.grid, self.clients = grid, set(clients)
        self.node_of: dict[str, int] = {}
        """Client -> its node, which may have left since."""
        self._asked: dict[str, _Asked] = {}
        """Message -> the node that was asked who it is."""
        self._known: set[int] = set()

    def online(self) -> dict[str, int]:
        """Client -> node, of those that are connected."""
        present = set(self.grid.get_node_ids())
        return {client: node for client, node in self.node_of.items() if node in present}

    def identify(self) -> None:
        """Ask new nodes which client they are, and note what has been answered. Does not wait."""
        now = time.monotonic()
        for message in self._pull(list(self._asked)):
            asked = self._asked.pop(message.metadata.reply_to_message_id)
            if message.has_error():
                logger.warning(f"node {asked.node} does not say which client it is: {reason_of(message)}")
                continue
            self._note(asked.node, str(facts_in(message.content).get(CLIENT, "")))
        self._asked = {name: asked for name, asked in self._asked.items() if asked.until > now}
        pending = {asked.node for asked in self._asked.values()}
        new = sorted(set(self.grid.get_node_ids()) - self._known - pending)
        messages = [Message(RecordDict(), node, WHO, ttl=IDENTIFY_SECONDS) for node in new]
        for node, name in zip(new, self._push(messages), strict=True):
            if name is not None:
                self._asked[name] = _Asked(node, now + IDENTIFY_SECONDS)

    def wait_for(self, count: int, limit: float) -> None:
        """Wait until clients are connected.

        Args:
            count: At least so many.
            limit: Seconds.

        Raises:
            UserError: There were fewer in time.
        """
        until, shown = time.monotonic() + limit, -1
        while True:
            self.identify()
            found = sorted(self.online())
            if len(found) != shown:
                logger.info(f"{len(found)} of {count} clients are connected: {', '.join(found) or 'none'}")
                shown = len(found)
            if len(found) >= count:
                return
            if time.monotonic() > until:
                hint = (
                    f"only {len(found)} of the {count} clients of a round were connected in {limit:g} s: "
                    "start their SuperNodes with --node-config 'client=\"NAME\"', or set "
                    "federated.clients_per_round or start-timeout"
                )
                raise user_error("start-timeout", f"{limit:g}", hint)
            time.sleep(POLL_SECONDS)

    def ask(
        self, contents: Mapping[str, tuple[int, RecordDict]], *, round_number: int, timeout: float
    ) -> Replies:
        """Send the messages of a round, and wait for the answers.

        Args:
            contents: Client -> node and content.
            round_number: From 0.
            timeout: Seconds. A later answer is not read.

        Returns:
            What came.
        """
        replies, waiting = Replies(), {}
        messages = []
        for node, content in contents.values():
            messages.append(Message(content, node, TRAIN, ttl=timeout, group_id=str(round_number)))
        for client, name in zip(contents, self._push(messages), strict=True):
            if name is None:
                replies.silent[client] = "its node left before the round"
            else:
                waiting[name] = client
        until = time.monotonic() + timeout
        while waiting and time.monotonic() < until:
            self.identify()
            for message in self._pull(list(waiting)):
                client = waiting.pop(message.metadata.reply_to_message_id)
                if not message.has_error():
                    replies.contents[client] = message.content
                elif _is_of_program(message):
                    replies.errors[client] = reason_of(message)
                else:
                    replies.silent[client] = reason_of(message)
            time.sleep(POLL_SECONDS)
        for client in waiting.values():
            replies.silent[client] = f"it did not answer within {timeout:g} s"
        return replies

    def _note(self, node: int, client: str) -> None:
        self._known.add(node)
        if client not in self.clients:
            logger.warning(f"node {node} is ignored: this run has no client {told(client)!r}")
            return
        before = self.node_of.get(client)
        if before is not None:
            logger.warning(f"client {client} has node {node} now, and had {before}")
        self.node_of[client] = node

    def _push(self, messages: list[Message]) -> list[str | None]:
        if not messages:
            return []
        names: list[str | None] = list(self.grid.push_messages(messages))
        if len(names) < len(messages):
            hint = "Flower refused the messages of a round as too large: choose a lower rank or fewer targets"
            raise user_error("messages", len(messages), hint)
        return [name or None for name in names]

    def _pull(self, names: list[str]) -> list[Message]:
        return list(self.grid.pull_messages(names)) if names else []


def reason_of(message: Message) -> str:
    """What an error of Flower says, in one line."""
    return told(message.error.reason or f"Flower's error {message.error.code}")


def _is_of_program(message: Message) -> bool:
    """Whether the client's program raised an error, and not the network."""
    failures = (
        ErrorCode.LOAD_CLIENT_APP_EXCEPTION,
        ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
        ErrorCode.INVALID_FAB,
    )
    return message.error.code in failures
