"""Tags on transfers, over mutual TLS."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from lclstream.api.client import AsyncTransferClient, TransferClient
from lclstream.api.config import ApiConfig
from lclstream.api.models import JobState
from lclstream.security import http

TAGS = {"dag_id": "stream_run", "run_id": "mfx:r0007 (später)", "try": "1"}


def test_a_transfer_is_found_again_by_its_tags(
    serving: Callable[[ApiConfig], str],
    settings: Callable[..., ApiConfig],
    sites: dict[str, Any],
    world: Any,
    configuration: dict[str, Any],
) -> None:
    world.engine_waits = True
    url, alice = serving(settings()), sites["s3df"].member("alice")
    with TransferClient(url, alice) as client:
        tagged = client.request(configuration, idempotency_key="k", tags=TAGS)
        assert tagged.tags == TAGS
        again = client.request(configuration, idempotency_key="k", tags={**TAGS, "try": "2"})
        assert (again.id, again.tags) == (tagged.id, TAGS), "a repeated request changes nothing"
        plain = client.request(configuration)
        assert plain.tags == {}
        assert client.info(tagged.id).tags == TAGS
        assert [one.id for one in client.list(tags={"dag_id": "stream_run", "try": "1"})] == [tagged.id]
        assert client.list(tags={"dag_id": "stream_run", "try": "2"}) == []
        assert client.list(tags={"run_id": TAGS["run_id"]}, state=JobState.failed) == []
        assert {one.id for one in client.list()} == {tagged.id, plain.id}
        for number in (tagged.id, plain.id):
            client.cancel(number)
        with pytest.raises(ValueError, match="is not NAME:VALUE"):
            client.request(configuration, tags={"a name": "x"})
    with http.client(url, alice) as raw:
        answer = raw.get("/v1/transfers", params={"tag": "no colon"})
        assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["query", "tag"])

    async def found() -> list[int]:
        async with AsyncTransferClient(url, alice) as client:
            return [one.id for one in await client.list(tags=TAGS)]

    assert asyncio.run(found()) == [tagged.id]


def test_more_tags_than_there_may_be_are_refused() -> None:
    from lclstream.jobs import tags

    assert tags.read(["a:1", "b:", "c:x:y"]) == {"a": "1", "b": "", "c": "x:y"}
    with pytest.raises(ValueError, match="17 tags are more than the 16"):
        tags.read(f"t{number}:x" for number in range(17))
    for word in ("", ":x", "a\nb:x", "a:\ud800", "a:" + 513 * "x"):
        with pytest.raises(ValueError, match="is not NAME:VALUE"):
            tags.read([word])
