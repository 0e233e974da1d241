"""The ClientApp: read the message, call the silo, answer. One message, one silo."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from dept_fl import records
from dept_fl.config import Recipe, home_dir
from dept_fl.errors import DeptError
from dept_fl.silo import Silo, Task

app = ClientApp()
Handler = Callable[[Message, Context], RecordDict]


def answers_errors(handler: Handler) -> Callable[[Message, Context], Message]:
    """An error that is the user's to mend goes to the server as one line, not as a traceback."""

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        try:
            content = handler(message, context)
        except DeptError as error:
            content = records.failure(error)
        return Message(content, reply_to=message)

    return answer


@app.query()
@answers_errors
def hosts(message: Message, context: Context) -> RecordDict:
    """Which silos does this node host?"""
    recipe = records.read_header(message.content).recipe
    return records.hosts_record(hosted_silos(recipe, context), simulated=True)


@app.query("register")
@answers_errors
def register(message: Message, context: Context) -> RecordDict:
    """Make a silo ready and tell the server its sizes."""
    return records.registration_record(_silo(message, context).register())


@app.train()
@answers_errors
def train(message: Message, context: Context) -> RecordDict:
    """One round of a silo."""
    silo = _silo(message, context)
    update = silo.train(_task(message, silo))
    began = time.perf_counter()
    content = records.update_record(update)
    content.metric_records[records.METRICS]["encode_s"] = time.perf_counter() - began
    return content


@app.evaluate()
@answers_errors
def finish(message: Message, context: Context) -> RecordDict:
    """The final body arrives: evaluate it and keep it."""
    silo = _silo(message, context)
    metrics, text = silo.finish(_task(message, silo))
    # Simulated silos have no secrets from the server unless the recipe says so.
    shared = silo.recipe.share_samples is not False
    return records.finished_record(silo.name, metrics, text if shared else None)


def hosted_silos(recipe: Recipe, context: Context) -> list[str]:
    """In simulation silos are dealt to the virtual nodes: silo i to node i mod P."""
    node = context.node_config
    if "partition-id" not in node or "num-partitions" not in node:
        raise DeptError("this node has no partition-id: it is not part of a simulation")
    index, nodes = int(node["partition-id"]), int(node["num-partitions"])
    return recipe.silo_names[index::nodes]


def _silo(message: Message, context: Context) -> Silo:
    header = records.read_header(message.content)
    if header.silo not in hosted_silos(header.recipe, context):
        raise DeptError(f"silo {header.silo!r} is not hosted by this node")
    home = home_dir(str(context.run_config.get("home", "")))
    return Silo(header.silo, header.recipe, home, header.experiment)


def _task(message: Message, silo: Silo) -> Task:
    return records.read_task(
        message.content, silo.name, silo.layout.body, silo.received_embedding_shapes
    )
