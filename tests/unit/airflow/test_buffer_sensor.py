"""What can be waited for in a buffer beside data and the end: that it fills, that it stands still."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException, TaskDeferred
from airflow.sdk.module_loading import import_string

from lclstream.api.models import TransferPhase
from lclstream_airflow.sensors.buffer import NNGBufferSensor


def sensor(**arguments: Any) -> NNGBufferSensor:
    given: dict[str, Any] = {"task_id": "watch", "transfer_id": 1, "poke_interval": 0.02, "timeout": 60}
    return NNGBufferSensor(**{**given, **arguments})


def waited(watch: NNGBufferSensor, context: dict[str, Any]) -> dict[str, Any]:
    """Wait as the triggerer does: with a trigger made again from its JSON."""
    import asyncio

    with pytest.raises(TaskDeferred) as deferral:
        watch.execute(context)
    path, arguments = deferral.value.trigger.serialize()
    trigger = import_string(path)(**json.loads(json.dumps(arguments)))

    async def first() -> Any:
        return (await anext(trigger.run())).payload

    result: dict[str, Any] = watch.resume_execution("execute_complete", {"event": asyncio.run(first())}, context)
    return result


def filling(transfer: Any, held: Iterator[int]) -> None:
    transfer.held = next(held, transfer.held)


@pytest.mark.parametrize("deferrable", [True, False])
def test_a_buffer_that_fills_is_told(transfers: Any, context: dict[str, Any], deferrable: bool) -> None:
    transfer = transfers.add()
    transfer.phase, transfer.capacity_bytes, held = TransferPhase.producing, 100, iter([1, 5, 8])
    transfers.before_info = lambda seen: filling(seen, held)
    watch = sensor(until="level", level="0.8", deferrable=deferrable)
    facts = waited(watch, context) if deferrable else watch.execute(context)
    assert facts["held_messages"] == 8
    assert transfer.calls.count("info") == 3


@pytest.mark.parametrize("deferrable", [True, False])
def test_a_stream_that_stands_still_is_told_and_one_that_moves_is_not(
    transfers: Any, context: dict[str, Any], deferrable: bool
) -> None:
    transfer = transfers.add()
    transfer.phase, transfer.held = TransferPhase.producing, 3
    moves = iter(range(1, 10))

    def move(seen: Any) -> None:
        seen.sent = next(moves, seen.sent)

    transfers.before_info = move
    watch = sensor(until="stalled", stalled_s=0.3, deferrable=deferrable)
    facts = waited(watch, context) if deferrable else watch.execute(context)
    assert facts["sent_messages"] == 9
    assert facts["held_messages"] == 3


@pytest.mark.parametrize("until", ["level", "stalled"])
def test_a_stream_that_ends_without_that_fails_the_sensor_or_skips_it(
    transfers: Any, context: dict[str, Any], until: str
) -> None:
    transfers.add().phase = TransferPhase.done
    with pytest.raises(AirflowFailException, match="transfer 1 is done, and was never"):
        waited(sensor(until=until), context)
    with pytest.raises(AirflowSkipException):
        waited(sensor(until=until, soft_fail=True), context)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "80"}, "level is '80': it must be a number above 0, at most 1"),
        ({"stalled_s": "soon"}, "stalled_s is 'soon': it must be a number above 0"),
    ],
)
def test_a_wrong_number_is_refused_before_waiting(
    transfers: Any, context: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    transfers.add()
    with pytest.raises(AirflowFailException, match=message):
        sensor(until="level", **arguments).execute(context)


def test_a_stall_cannot_be_seen_by_a_sensor_that_forgets_its_looks() -> None:
    with pytest.raises(ValueError, match="compares two looks"):
        sensor(until="stalled", deferrable=False, mode="reschedule")
