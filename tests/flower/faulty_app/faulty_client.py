"""The ClientApp, with faults: a file CLIENT-ROUND in the folder `faults` of the node config names one."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from flora_train.federated.flower import client_app

app = ClientApp()


@app.query("client")
def client(message: Message, context: Context) -> Message:
    """As it is."""
    return client_app.app(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """As it is, unless a file asks for a fault; then `begun` is added to the name of the file."""
    number = message.content.config_records["facts"]["round"]
    path = Path(str(context.node_config["faults"])) / f"{context.node_config['client']}-{number}"
    fault = path.read_text() if path.exists() else ""
    if fault:
        path.rename(f"{path}-begun")
    if fault == "crash":
        raise RuntimeError("out of memory")
    if fault == "sleep":
        time.sleep(600)
    if fault.startswith("slow"):
        time.sleep(float(fault.split()[1]))
    reply = client_app.app(message, context)
    if fault == "nan":
        _change(reply, lambda array: np.full_like(array, np.nan))
    if fault == "shape":
        _change(reply, lambda array: array[..., :1])
    if fault == "archive":
        values = dict(reply.content.array_records["values"])
        name = min(values)
        values[name] = Array(
            values[name].dtype, values[name].shape, values[name].stype, b"PK\x03\x04" + bytes(60)
        )
        reply.content["values"] = ArrayRecord(values)
    return reply


def _change(reply: Message, change) -> None:  # type: ignore[no-untyped-def]
    """Change the first array of an answer."""
    values = dict(reply.content.array_records["values"])
    name = sorted(values)[0]
    values[name] = Array.from_numpy_ndarray(change(values[name].numpy()))
    reply.content["values"] = ArrayRecord(values)
