"""The nodes of a Flower run: which client each of them is, and what they answer in a round."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import httpx
from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from flora_train.config.errors import user_error
from flora_train.federated.flower.records import ERROR, facts_in
from flora_train.federated.remote import told

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
IDENTIFY_SECONDS = 120.0
"""Within which a node has to say which client it is. It is asked again after so many, and no sooner."""
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
    """Client -> what is wrong with its answer, or what its program failed with."""
    silent: dict[str, str] = field(default_factory=dict)
    """Client -> why there is no answer."""
    sent: set[str] = field(default_factory=set)
    """The clients whose message Flower took."""


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
        self._nodes_of: dict[str, list[int]] = {}
        """Client -> all nodes that stated its name, the newest last. They may have left since."""
        self._used: dict[str, int] = {}
        """Client -> its node when it was last looked up."""
        self._asked: dict[str, _Asked] = {}
        """Message -> the node that was asked who it is."""
        self._known: set[int] = set()
        self._ask_again: dict[int, float] = {}
        """Node that could not say which client it is -> when it is asked again."""

    def online(self) -> dict[str, int]:
        """Client -> its newest node that is connected, of the clients that have one."""
        present = set(self.grid.get_node_ids())
        found: dict[str, int] = {}
        for client, nodes in self._nodes_of.items():
            connected = [node for node in nodes if node in present]
            if connected:
                found[client] = connected[-1]
        for client, node in found.items():
            before = self._used.get(client, node)
            if before != node:
                logger.warning(f"client {client} has node {node} now, and had {before}")
        self._used |= found
        return found

    def identify(self) -> None:
        """Ask new nodes which client they are, and note what has been answered. Does not wait."""
        now = time.monotonic()
        for name, reply in self._pull(list(self._asked)):
            node = self._asked.pop(name).node
            failure = _failure_of(reply)
            if failure is not None:
                logger.warning(f"node {node} does not say which client it is: {failure}")
                self._ask_again[node] = now + IDENTIFY_SECONDS
                continue
            assert not isinstance(reply, str)
            self._note(node, str(facts_in(reply.content).get(CLIENT, "")))
        self._asked = {name: asked for name, asked in self._asked.items() if asked.until > now}
        pending = {asked.node for asked in self._asked.values()}
        later = {node for node, moment in self._ask_again.items() if moment > now}
        new = sorted(set(self.grid.get_node_ids()) - self._known - pending - later)
        messages = [Message(RecordDict(), node, WHO, ttl=IDENTIFY_SECONDS) for node in new]
        for node, message in zip(new, self._push(messages), strict=True):
            if message is not None:
                self._asked[message] = _Asked(node, now + IDENTIFY_SECONDS)

    def wait_for(self, clients: Collection[str], count: int, limit: float) -> bool:
        """Wait until some of these clients are connected.

        Args:
            clients: Those that count.
            count: At least so many of them.
            limit: Seconds.

        Returns:
            Whether they were, in time.
        """
        until, shown = time.monotonic() + limit, -1
        while True:
            self.identify()
            found = sorted(self.online().keys() & set(clients))
            if len(found) >= count:
                return True
            if len(found) != shown:
                logger.info(
                    f"waiting for {count} of {len(clients)} clients, of which {len(found)} are connected: "
                    f"{', '.join(found) or 'none'}"
                )
                shown = len(found)
            if time.monotonic() > until:
                return False
            time.sleep(min(POLL_SECONDS, limit))

    def wait_for_first(self, chosen: Collection[str], limit: float) -> None:
        """Wait until all clients of the first round are connected.

        Args:
            chosen: The clients of that round.
            limit: Seconds. After them, as many other clients are enough to begin with.

        Raises:
            UserError: Fewer clients were connected in time than a round has.
        """
        if self.wait_for(chosen, len(chosen), limit):
            return
        connected = len(self.online())
        if connected < len(chosen):
            hint = (
                f"only {connected} of the {len(chosen)} clients of a round were connected in {limit:g} s: "
                "start their SuperNodes with --node-config 'client=\"NAME\"', or set "
                "federated.clients_per_round or start-timeout"
            )
            raise user_error("start-timeout", f"{limit:g}", hint)

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
                replies.sent.add(client)
        until = time.monotonic() + timeout
        while waiting and time.monotonic() < until:
            self.identify()
            for name, reply in self._pull(list(waiting)):
                _sort(reply, waiting.pop(name), replies)
            if waiting:
                time.sleep(POLL_SECONDS)
        for client in waiting.values():
            replies.silent[client] = f"it did not answer within {timeout:g} s"
        return replies

    def _note(self, node: int, client: str) -> None:
        self._known.add(node)
        if client not in self.clients:
            logger.warning(f"node {node} is ignored: this run has no client {told(client)!r}")
            return
        self._nodes_of.setdefault(client, []).append(node)

    def _push(self, messages: list[Message]) -> list[str | None]:
        if not messages:
            return []
        names: list[str | None] = list(self.grid.push_messages(messages))
        if len(names) < len(messages):
            hint = "Flower refused the messages of a round as too large: choose a lower rank or fewer targets"
            raise user_error("messages", len(messages), hint)
        return [name or None for name in names]

    def _pull(self, names: list[str]) -> Iterator[tuple[str, Message | str]]:
        """(message, its answer) of those that are answered. A text says why an answer cannot be read.

        Messages are pulled one at a time: one that Flower cannot read takes no other with it.
        """
        for name in names:
            try:
                messages = list(self.grid.pull_messages([name]))
            except httpx.HTTPError:
                raise
            except Exception as error:  # of a client's making: the bytes of a message are its own
                yield name, f"its answer cannot be read ({type(error).__name__})"
                continue
            for message in messages:
                yield name, message


def _sort(reply: Message | str, client: str, replies: Replies) -> None:
    """Note what an answer in a round is."""
    if isinstance(reply, str):
        replies.errors[client] = reply
    elif not reply.has_error():
        replies.contents[client] = reply.content
    elif _is_of_program(reply):
        replies.errors[client] = f"its program failed: {reason_of(reply)}"
    else:
        replies.silent[client] = reason_of(reply)


def _failure_of(reply: Message | str) -> str | None:
    """Why a node does not say which client it is; None if it does."""
    if isinstance(reply, str):
        return reply
    if reply.has_error():
        return reason_of(reply)
    error = facts_in(reply.content).get(ERROR)
    return None if error is None else told(error)


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
