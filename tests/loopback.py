"""A server on this machine that lives as long as a test wants."""

from http.server import ThreadingHTTPServer
from threading import Thread
from typing import Self


class Loopback:
    """Serves what `server` handles. Use it as a context manager."""

    server: ThreadingHTTPServer

    def __enter__(self) -> Self:
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server.server_port}"
