"""The ClientApp: read the message, call the silo, answer. One message, one silo."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from dept_fl import records
from dept_fl.config import Recipe, home_dir
from dept_fl.deadline import ends_within
from dept_fl.errors import DeptError
from dept_fl.silo import Silo, Task
from dept_fl.silo_file import load_silo_file

app = ClientApp()
Handler = Callable[[Message, Context], RecordDict]


def answers_errors(handler: Handler) -> Callable[[Message, Context], Message]:
    """An error that is the user's to mend goes to the server as one line, not as a traceback."""

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        try:
            with _in_time(message, context):
                content = handler(message, context)
        except DeptError as error:
            print(f"error: {error}", flush=True)
            content = records.failure(error)
        return Message(content, reply_to=message)

    return answer


@app.query()
@answers_errors
def hosts(message: Message, context: Context) -> RecordDict:
    """Which silos does this node host?"""
    recipe = records.read_header(message.content).recipe
    return records.hosts_record(hosted_silos(recipe, context))


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
    encode_s = update.metrics["encode_s"] + time.perf_counter() - began
    content.metric_records[records.METRICS]["encode_s"] = encode_s
    return content


@app.evaluate()
@answers_errors
def finish(message: Message, context: Context) -> RecordDict:
    """The final body arrives: evaluate it and keep it."""
    silo = _silo(message, context)
    metrics, text, warning = silo.finish(_task(message, silo))
    shared = silo.recipe.share_samples
    if shared is None:  # simulated silos have no secrets from the server unless the recipe says so
        shared = not _is_real(context)
    return records.finished_record(silo.name, metrics, text if shared else None, warning)


def hosted_silos(recipe: Recipe, context: Context) -> list[str]:
    """The silo of the node's file; in simulation silo i of the recipe is at node i mod P."""
    node = context.node_config
    if _is_real(context):
        return [load_silo_file(str(node["silo"])).name]
    if "partition-id" not in node or "num-partitions" not in node:
        raise DeptError(
            "this node has no silo: start its SuperNode with --node-config "
            "'silo=\"/absolute/path/of/the/silo.yaml\"'"
        )
    index, nodes = int(node["partition-id"]), int(node["num-partitions"])
    return recipe.silo_names[index::nodes]


def _is_real(context: Context) -> bool:
    """Whether this is a partner's node, which has a silo's file, and no simulated one."""
    return "silo" in context.node_config


def _silo(message: Message, context: Context) -> Silo:
    header = records.read_header(message.content)
    hosted = hosted_silos(header.recipe, context)
    if header.silo not in hosted:
        raise DeptError(f"silo {header.silo!r} is not hosted by this node ({', '.join(hosted)} is)")
    if not _is_real(context):
        home = home_dir(str(context.run_config.get("home", "")))
        return Silo(header.silo, header.recipe, home, header.experiment)
    # Nothing of a partner's own is taken from the server: neither paths nor its home.
    file = load_silo_file(str(context.node_config["silo"]))
    print(f"silo {header.silo}: {message.metadata.message_type}", flush=True)
    return Silo(header.silo, file.over(header.recipe), file.home, header.experiment)


def _in_time(message: Message, context: Context) -> AbstractContextManager[None]:
    if not _is_real(context):
        return nullcontext()  # simulated silos share their process and queue for the machine
    header = records.read_header(message.content)
    return ends_within(header.limit_s, f"{message.metadata.message_type} of silo {header.silo}")


def _task(message: Message, silo: Silo) -> Task:
    return records.read_task(message.content, silo)
