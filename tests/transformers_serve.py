"""A real `transformers serve` of the bundled model on 127.0.0.1, and a reverse proxy before it that counts and fails.

The server ignores `n`, samples only where the model's generation_config sets `do_sample`, has one seed for all
requests, generates one answer after the other, and finishes those that nobody waits for any more.
"""

import http.client
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Condition
from typing import Any

from loopback import Loopback

Body = dict[str, Any]
STARTS_WITHIN = 120  # seconds; some five where nothing else runs


class TransformersServe:
    """The server's process. Use it as a context manager; it can be killed and started again on its port.

    Attributes:
        model: the folder that is served, which is the model's name there too.
    """

    def __init__(self, bundled: str | Path, folder: Path) -> None:
        self.model, self.log = str(folder / "demo"), folder / "serve.log"
        shutil.copytree(bundled, self.model)
        config = Path(self.model) / "generation_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "do_sample": True}))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def __enter__(self) -> "TransformersServe":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [str(Path(sys.executable).with_name("transformers")), "serve", self.model, "--device", "cpu"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port)],
                env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + STARTS_WITHIN
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"transformers serve did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        with suppress(OSError), closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    def kill(self) -> None:
        """SIGKILL: nothing is told to anybody."""
        self.process.kill()
        self.process.wait()


@dataclass
class Fault:
    """What becomes of the next `times` requests (`None`: of all) that `where` picks by their body."""

    what: str
    times: int | None
    where: Callable[[Body], bool]
    status: int = 0
    text: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0


@dataclass(eq=False)
class Proxy(Loopback):
    """The proxy. Use it as a context manager.

    Attributes:
        port: of the server behind it.
        change: what it does to the server's answers.
        asked: the bodies of the requests, in order; `headers`: those of each; `times`: when each came.
        answered: the bodies of those whose answer of the server went out whole.
        under_way, most: how many there are at once, now and at most. `abandoned`: those whose client left before.
    """

    port: int
    change: Callable[[Any], Any] = lambda answer: answer
    faults: list[Fault] = field(default_factory=list)
    asked: list[Body] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    answered: list[Body] = field(default_factory=list)
    under_way: int = 0
    most: int = 0
    abandoned: int = 0
    unanswered: int = 0

    def __post_init__(self) -> None:
        self.changed = Condition()
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.proxy = self

    def fail(
        self,
        status: int,
        text: str = "overloaded",
        *,
        times: int | None = None,
        where: Callable[[Body], bool] = lambda body: True,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Answer with this status and text."""
        self.faults.append(Fault("fail", times, where, status=status, text=text, headers=headers or {}))

    def drop(self, *, times: int | None = None, where: Callable[[Body], bool] = lambda body: True) -> None:
        """Close the connection without an answer."""
        self.faults.append(Fault("drop", times, where))

    def cut(self, *, times: int | None = None, where: Callable[[Body], bool] = lambda body: True) -> None:
        """Close the connection in the middle of an answer."""
        self.faults.append(Fault("cut", times, where))

    def hang(
        self, seconds: float, *, times: int | None = None, where: Callable[[Body], bool] = lambda body: True
    ) -> None:
        """Pass a request on only after `seconds`, or not at all where the client leaves before."""
        self.faults.append(Fault("hang", times, where, seconds=seconds))

    def take_fault(self, body: Body) -> Fault | None:
        """The fault that is meant for this request."""
        with self.changed:
            for fault in self.faults:
                if fault.times != 0 and fault.where(body):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def wait_until(self, reached: Callable[[], bool], seconds: float = 60) -> bool:
        """Whether it comes to that within so many seconds."""
        with self.changed:
            return self.changed.wait_for(reached, seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: Proxy


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass  # `asked` has them

    def do_POST(self) -> None:
        proxy, length = self.server.proxy, int(self.headers["Content-Length"])
        data = self.rfile.read(length)
        if len(data) < length:  # the client left while it was asking
            self.close_connection = True
            return
        body = json.loads(data)
        with proxy.changed:
            proxy.asked.append(body)
            proxy.headers.append({name.lower(): value for name, value in self.headers.items()})
            proxy.times.append(time.monotonic())
            proxy.paths.append(self.path)
            proxy.under_way += 1
            proxy.most = max(proxy.most, proxy.under_way)
            proxy.changed.notify_all()
        answered = False
        try:
            answered = self.answer(proxy, body, data)
        except (BrokenPipeError, ConnectionResetError):
            self.leave()
        finally:
            with proxy.changed:
                proxy.under_way -= 1
                if answered:
                    proxy.answered.append(body)
                proxy.changed.notify_all()

    def answer(self, proxy: Proxy, body: Body, data: bytes) -> bool:
        """Whether the server's answer went out."""
        fault = proxy.take_fault(body)
        if fault is not None and fault.what == "fail":
            self.send(fault.status, fault.text.encode(), fault.headers)
            return False
        if fault is not None and fault.what == "hang":
            if select.select([self.connection], [], [], fault.seconds)[0] and not self.connection.recv(
                1, socket.MSG_PEEK
            ):
                self.leave()
                return False
        elif fault is not None:
            if fault.what == "cut":
                self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices": [')
            self.hang_up()
            return False
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", proxy.port)) as connection:
                connection.request("POST", self.path, data, {"Content-Type": "application/json"})
                response = connection.getresponse()
                status, text = response.status, response.read()
        except (OSError, http.client.HTTPException):  # the server is gone: as if there were no proxy
            with proxy.changed:
                proxy.unanswered += 1
            self.hang_up()
            return False
        if status == 200:
            text = json.dumps(proxy.change(json.loads(text))).encode()
        self.send(status, text, {"Content-Type": "application/json"})
        return status == 200

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def leave(self) -> None:
        self.close_connection = True
        with self.server.proxy.changed:
            self.server.proxy.abandoned += 1
            self.server.proxy.changed.notify_all()

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
