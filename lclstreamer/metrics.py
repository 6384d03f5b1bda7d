"""A rank's counters over HTTP: ``/metrics`` for Prometheus, ``/status`` as JSON.

One thread serves; it reads the counters that the main thread writes.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from lclstreamer.errors import ConfigurationError, ConnectError
from lclstreamer.progress import Counters

_HELP = {
    "events": ("events_total", "Events sent or about to be sent"),
    "skipped": ("incomplete_events_total", "Events left out because a data source gave nothing"),
    "dropped": ("dropped_events_total", "Events a pipeline left out"),
    "messages": ("messages_total", "Messages made"),
    "nbytes": ("message_bytes_total", "Bytes of all messages"),
    "waited_s": ("sink_wait_seconds_total", "Seconds spent waiting for data handlers"),
    "read_s": ("source_wait_seconds_total", "Seconds spent waiting for data"),
}


def prometheus(counters: Counters) -> str:
    """The counters in Prometheus' text format."""
    lines: list[str] = []
    counters.refresh()
    for name, (metric, text) in _HELP.items():
        full = f"lclstreamer_{metric}"
        value = getattr(counters, name)
        lines += [f"# HELP {full} {text}", f"# TYPE {full} counter", f'{full}{{rank="{counters.rank}"}} {value}']
    lines += [
        "# HELP lclstreamer_missing_values_total Events a data source gave nothing for",
        "# TYPE lclstreamer_missing_values_total counter",
    ]
    for source, count in list(counters.missing.items()):
        label = source.replace("\\", r"\\").replace('"', r"\"")
        lines.append(f'lclstreamer_missing_values_total{{rank="{counters.rank}",data_source="{label}"}} {count}')
    return "\n".join(lines) + "\n"


class MetricsServer:
    """Serves a rank's counters while it is used as a context manager.

    Args:
        url: ``http://HOST:PORT``; rank r listens at PORT + r, port 0 is any free one.
        counters: what to tell.

    Raises:
        ConfigurationError: the URL is none.
        ConnectError: the address cannot be listened at.
    """

    def __init__(self, url: str, counters: Counters) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = None
        if parts.scheme != "http" or not parts.hostname or port is None:
            raise ConfigurationError(f"--metrics {url}: http://HOST:PORT is needed, e.g. http://127.0.0.1:9100")
        place = (parts.hostname, port + counters.rank if port else 0)
        try:
            self._server = ThreadingHTTPServer(place, _handler(counters))
        except OSError as error:
            raise ConnectError(
                f"--metrics {url}: rank {counters.rank} cannot listen at {place[0]}:{place[1]}: {error.strerror}"
            ) from error
        self._server.daemon_threads = True
        self.url = f"http://{parts.hostname}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True)

    def __enter__(self) -> MetricsServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _json(counters: Counters) -> str:
    counters.refresh()
    return json.dumps(counters.as_dict())


def _handler(counters: Counters) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, "text/plain; version=0.0.4", prometheus(counters))
            elif self.path in ("/", "/status"):
                self._answer(200, "application/json", _json(counters))
            else:
                self._answer(404, "text/plain", "there are /metrics and /status\n")

        def _answer(self, code: int, kind: str, text: str) -> None:
            content = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: requests come every few seconds."""

    return Handler
