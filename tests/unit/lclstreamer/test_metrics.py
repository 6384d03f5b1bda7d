"""Counters over HTTP."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from typing import Any

import pytest

from lclstreamer.errors import ConfigurationError, ConnectError
from lclstreamer.metrics import MetricsServer, prometheus
from lclstreamer.progress import Counters


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        text: str = answer.read().decode()
        return text


def test_a_running_rank_tells_its_counters_as_prometheus_and_json() -> None:
    counters = Counters(rank=2, events=5, nbytes=100, missing={"a": 3})
    with MetricsServer("http://127.0.0.1:0", counters) as server:
        assert 'lclstreamer_events_total{rank="2"} 5' in fetch(f"{server.url}/metrics")
        counters.events = 6
        assert json.loads(fetch(f"{server.url}/status"))["events"] == 6
        with pytest.raises(urllib.error.HTTPError):
            fetch(f"{server.url}/other")


def test_missing_values_have_the_name_of_their_data_source() -> None:
    text = prometheus(Counters(rank=1, missing={'odd"name': 3}))
    assert r'lclstreamer_missing_values_total{rank="1",data_source="odd\"name"} 3' in text


@pytest.mark.parametrize("url", ["127.0.0.1:9100", "https://127.0.0.1:9100", "http://127.0.0.1", "http://a:b"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="HOST:PORT"):
        MetricsServer(url, Counters())


def test_each_rank_has_a_port_and_one_in_use_is_named(free_port: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConnectError, match=f"rank 1 cannot listen at 127.0.0.1:{port}"):
            MetricsServer(f"http://127.0.0.1:{port - 1}", Counters(rank=1))
