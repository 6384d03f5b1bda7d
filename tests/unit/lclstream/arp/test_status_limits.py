"""What the run processor's status server bears of a peer."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from lclstream.arp.config import StatusConfig
from lclstream.arp.service import served
from lclstream.security.http import client
from lclstream.security.rate import Rate


def test_one_who_asks_too_often_is_told_when_to_come_back(sites: dict[str, Any]) -> None:
    settings = StatusConfig(port=0, rate=Rate(per_s=0.01, burst=2))
    with (
        served(FastAPI(), settings, sites["s3df"].member("arp")) as url,
        client(url, sites["s3df"].member("alice")) as alice,
        client(url, sites["s3df"].member("bob")) as bob,
    ):
        assert [alice.get("/openapi.json").status_code for _ in range(3)] == [200, 200, 429]
        assert bob.get("/openapi.json").status_code == 200, "others are served"
        assert bob.post("/openapi.json", content=b" " * (5 << 20)).status_code == 413
