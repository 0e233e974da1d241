"""What a silo sends in a deployment, read off the wire, against what metrics.jsonl says.

    python -m benchmarks.capture [--rounds 3] [--json benchmarks/results/capture.json]

A small SPEC-OPT federation of two SuperNodes on loopback, without TLS so that it can be read.
Between each SuperNode and the SuperLink stands a proxy that keeps every request. From these the
replies of each silo are put together, record by record; what is in them must be one array of the
body's bytes and no others, as many as the body has by its shapes and as the ledger tells.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_object_head_values_from_object_content,
)
from rich import box
from rich.console import Console
from rich.table import Table

from dept_fl.config import load_recipe
from dept_fl.cost import wire_bytes
from dept_fl.model import layout
from dept_fl.report import Ledger
from tests.conftest import SETTINGS, write_text
from tests.deployment import CONNECTION, Federation

VOCABULARIES = {"ant": 320, "bee": 330}


@dataclass
class Capture:
    """All that one SuperNode sent.

    Attributes:
        requests: bytes of request bodies by path.
    """

    messages: list[PushMessagesRequest] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self, path: str, body: bytes) -> None:
        with self.lock:
            self.requests[path] = self.requests.get(path, 0) + len(body)
            if path.endswith("/push-messages"):
                self.messages.append(PushMessagesRequest.FromString(body))
            elif path.endswith("/push-object"):
                pushed = PushObjectRequest.FromString(body)
                self.objects[pushed.object_id] = pushed.object_content

    def replies(self) -> Iterator[tuple[str, str, dict[str, dict[str, int]]]]:
        """Type and round of each reply, and by record the bytes of its arrays or of itself."""
        for message in self.messages:
            metadata = message.messages_list[0].metadata
            if metadata.message_id not in self.objects:
                continue  # the run ended before it was sent
            records = self._children(self._children_of(metadata.message_id)[0])
            found = {name: self._record(object_id) for name, object_id in records.items()}
            yield metadata.message_type, metadata.group_id, found

    def _children_of(self, object_id: str) -> list[str]:
        return get_object_head_values_from_object_content(self.objects[object_id])[1]

    def _children(self, object_id: str) -> dict[str, str]:
        """The named parts of a RecordDict or an ArrayRecord."""
        named: dict[str, str] = json.loads(_body(self.objects[object_id]))
        return named

    def _record(self, object_id: str) -> dict[str, int]:
        content = self.objects[object_id]
        if get_object_head_values_from_object_content(content)[0] != "ArrayRecord":
            return {"": len(content)}
        return {name: self._array(array) for name, array in self._children(object_id).items()}

    def _array(self, object_id: str) -> int:
        chunks = self._children_of(object_id)
        return sum(len(_body(self.objects[chunk])) for chunk in chunks)


def _body(content: bytes) -> bytes:
    return content[content.index(b"\0") + 1 :]


@contextmanager
def proxy(port: int) -> Iterator[tuple[int, Capture]]:
    """A loopback proxy in front of a SuperLink's port; yields its own port and what it sees."""
    capture = Capture()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            capture.keep(self.path, body)
            upstream = HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                upstream.request("POST", self.path, body, dict(self.headers))
                answer = upstream.getresponse()
                data = answer.read()
            except OSError:  # the SuperLink is ending
                self.send_error(502)
                return
            finally:
                upstream.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port, capture
    finally:
        server.shutdown()
        server.server_close()


def run(folder: Path, rounds: int) -> tuple[dict[str, Capture], Ledger, int]:
    """The federation, to its end; what each silo sent, and the bytes that a body has."""
    recipe = folder / "recipe.yaml"
    deployed = SETTINGS.partition("silos:")[0]
    recipe.write_text(f"{deployed}min_silos: {len(VOCABULARIES)}\nround_timeout_s: 120\n")
    federation = Federation(folder, secure=False)
    captures: dict[str, Capture] = {}
    try:
        federation.superlink()
        with (
            proxy(federation.superlink_port) as (ant, captures["ant"]),
            proxy(federation.superlink_port) as (bee, captures["bee"]),
        ):
            for silo, port in (("ant", ant), ("bee", bee)):
                federation.port = port
                file = silo_file(folder, silo)
                federation.supernode(silo, f'silo="{file}"')
            run_dir = folder / "run"
            words = f'recipe="{recipe}" overrides="rounds={rounds}" run-dir="{run_dir}"'
            app = Path(__file__).resolve().parents[1]
            federation.flwr("run", str(app), CONNECTION, "--stream", "--run-config", words)
    finally:
        federation.close()
    loaded = load_recipe(recipe)
    body = layout(loaded.model, loaded.sequence_tokens).body
    return captures, Ledger(run_dir), wire_bytes(body)


def silo_file(folder: Path, silo: str) -> Path:
    write_text(folder, silo)
    file = folder / f"{silo}.yaml"
    file.write_text(
        f"name: {silo}\nfiles: {silo}.jsonl\nvocab_size: {VOCABULARIES[silo]}\n"
        f"home: home-{silo}\nvalidation_fraction: 0.2\n"
    )
    return file


def compare(
    captures: dict[str, Capture], ledger: Ledger, body_bytes: int
) -> list[dict[str, object]]:
    """A row for each silo and round: bytes on the wire beside the body's and the ledger's."""
    told = {(e["silo"], str(e["round"])): e for e in ledger.read() if e["event"] == "silo_train"}
    rows: list[dict[str, object]] = []
    for silo, capture in captures.items():
        for kind, round_, records in capture.replies():
            if kind != "train":
                continue
            event = told[silo, round_]
            rows.append(
                {
                    "silo": silo,
                    "round": int(round_),
                    "arrays": sum(len(r) for r in records.values() if "" not in r),
                    "body": body_bytes,
                    "wire_body": sum(records["body"].values()),
                    "ledger_body": event["bytes_up_body"],
                    "wire_embeddings": sum(records.get("embeddings", {}).values()),
                    "ledger_embeddings": event["bytes_up_embeddings"],
                    "wire_metrics": records["metrics"][""],
                    "wire_task": records["task"][""],
                    "other_records": sorted(records.keys() - {"body", "metrics", "task"}),
                }
            )
    return rows


def agrees(row: dict[str, object]) -> bool:
    """Whether the ledger tells what was on the wire, and that was the body and no more."""
    same = row["wire_body"] == row["ledger_body"] == row["body"] and row["arrays"] == 1
    none = row["wire_embeddings"] == row["ledger_embeddings"] == 0
    return same and none and row["other_records"] == []


def show(rows: list[dict[str, object]], captures: dict[str, Capture]) -> None:
    table = Table(title="train replies: bytes on the wire and in metrics.jsonl", box=box.SIMPLE)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(str(value or "-") if value != 0 else "0" for value in row.values()))
    console = Console(width=140, highlight=False)
    console.print(table)
    for silo, capture in captures.items():
        kinds = [kind for kind, _, _ in capture.replies()]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        console.print(f"{silo} sent {counts}; in all {sum(capture.requests.values()):,} bytes:")
        for path, size in sorted(capture.requests.items(), key=lambda each: -each[1]):
            console.print(f"  {path:36} {size:>10,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        captures, ledger, body_bytes = run(Path(folder), given.rounds)
        rows = compare(captures, ledger, body_bytes)
    show(rows, captures)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    if len(rows) != given.rounds * len(VOCABULARIES) or not all(map(agrees, rows)):
        sys.exit("the ledger and the wire disagree")


if __name__ == "__main__":
    main()
