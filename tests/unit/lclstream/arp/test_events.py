from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lclstream.arp.events import FileEvent, Irrelevant, JobEvent, RunEvent, UnreadableError, read


def message(value: Any, crud: str = "Create") -> bytes:
    return json.dumps({"experiment_name": "mfx1", "CRUD": crud, "value": value, "future": 1}).encode()


def test_a_run_with_nan_unknown_fields_and_a_naive_time_is_read() -> None:
    event = read("runs", message({"num": 7, "begin_time": "2026-03-01T12:00:00", "params": {"x": math.nan}, "new": 1}))
    assert isinstance(event, RunEvent)
    assert (event.experiment, event.number, event.crud) == ("mfx1", 7, "Create")
    assert event.run.begin_time is not None
    assert event.run.begin_time.utcoffset() is not None
    assert math.isnan(event.document["params"]["x"])


@pytest.mark.parametrize("number", [7, "grid7_0012", "0007"])
def test_a_run_number_stays_what_it_is(number: int | str) -> None:
    event = read("runs", message({"num": number}))
    assert isinstance(event, RunEvent)
    assert event.number == number


def test_files_and_jobs_are_read() -> None:
    file = read("file_catalog", message({"path": "/a", "run_num": 3, "locations": {"s3df": {"asof": "…"}}}, "Update"))
    assert isinstance(file, FileEvent)
    assert (file.number, set(file.file.locations)) == (3, {"s3df"})
    job = read("workflow_jobs", message({"_id": "j", "run_num": 3, "status": "START"}))
    assert isinstance(job, JobEvent)
    assert (job.number, job.job.id) == (3, "j")


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (None, "empty"),
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[1]", "not a message of the logbook"),
        (b'{"experiment_name": "mfx1", "value": {}}', "CRUD: Field required"),
        (message({"type": "DATA"}), "value.num: Field required"),
        (message({"num": 1, "end_time": "yesterday"}), "value.end_time"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_message_of_the_logbook_is_said_with_the_place(payload: bytes | None, why: str) -> None:
    with pytest.raises(UnreadableError, match=why):
        read("runs", payload)


def test_other_topics_and_other_kinds_of_change_are_not_errors() -> None:
    assert isinstance(read("elog", message({"content": "hello"})), Irrelevant)
    assert isinstance(read("runs", message({"num": 1}, "Make_Current")), Irrelevant)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        ).map(lambda value: message(value)),
    ),
    st.sampled_from(["runs", "file_catalog", "workflow_jobs", "other"]),
)
def test_whatever_comes_is_read_or_refused_and_never_breaks_the_reader(payload: bytes, topic: str) -> None:
    with suppress(UnreadableError):
        read(topic, payload)
