"""The ClientApp: one client's part of a round, on its own machine and examples."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flora_train.config.errors import UserError, user_error
from flora_train.federated.flower.records import ERROR, FACTS

app = ClientApp()

CLIENT = "client"
"""Key of --node-config, and of the answer to `client`."""


@app.query("client")
def client(message: Message, context: Context) -> Message:
    """Say which client this node is. Flower starts a process for every message: nothing heavy is loaded."""
    try:
        return _reply(message, {CLIENT: name_of(context)})
    except UserError as error:
        return _reply(message, {CLIENT: "", ERROR: str(error)})


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train this client's adapter from the values in the message."""
    from flora_train.federated.flower.client_round import train_client
    from flora_train.runtime.logging import init_logging

    init_logging()
    try:
        return Message(train_client(name_of(context), message.content, context), reply_to=message)
    except UserError as error:
        return _reply(message, {ERROR: str(error)})


def name_of(context: Context) -> str:
    """The client that this node is. Raises UserError if its configuration does not say so."""
    name = context.node_config.get(CLIENT)
    if not isinstance(name, str) or not name:
        hint = "start this SuperNode with --node-config 'client=\"NAME\"'"
        raise user_error("node-config", name, hint)
    return name


def _reply(message: Message, facts: dict[str, str]) -> Message:
    return Message(RecordDict({FACTS: ConfigRecord(dict(facts))}), reply_to=message)
