"""Whatever goes in comes out: HDF5 messages of any dtype, shape, batch size, codec and pattern of missing values."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lclstreamer import models
from lclstreamer.events import Event, Message, Ragged
from lclstreamer.serializers.base import SerializerContext
from lclstreamer.serializers.hdf5 import HDF5BinarySerializer

DTYPES = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
]
CODECS = [None, "gzip", "gzip_with_shuffle", "bitshuffle_with_lz4", "bitshuffle_with_zstd", "zfp"]


def stream(events: list[dict[str, Any]], batch: int, codec: str | None, **options: Any) -> list[bytes]:
    """What the engine would send for these events."""
    parameters = models.HDF5BinarySerializer(
        type="HDF5BinarySerializer", fields={name: f"/x/{name}" for name in events[0]}, compression=codec, **options
    )
    writer = HDF5BinarySerializer(parameters, SerializerContext(batch_size=batch, slots=2))
    made: list[bytes] = []

    def take(message: Message) -> None:
        made.append(bytes(message))
        message.release()

    for number, values in enumerate(events):
        for message in writer.add(Event(values, number)):
            take(message)
        if number % batch == batch - 1:
            for message in writer.end_batch():
                take(message)
    for message in writer.end_batch():
        take(message)
    writer.close()
    return made


def rows(messages: list[bytes], name: str, datasets: Any) -> list[Any]:
    """The values of a field, event by event, `None` where missing."""
    found: list[Any] = []
    for message in messages:
        content = datasets(message)
        if f"/x/{name}" not in content:
            assert name in list(content[""]["missing"])
            count = max(len(value) for path, value in content.items() if path.startswith("/x/"))
            found += [None] * count
            continue
        data, missing = content[f"/x/{name}"], content.get(f"/x/{name}_missing")
        found += [None if missing is not None and missing[row] else data[row] for row in range(len(data))]
    return found


SLOW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@SLOW
@given(data=st.data())
def test_arrays_come_back_bit_by_bit(datasets: Any, data: st.DataObject) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, max_side=7))
    count, batch = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    codec = data.draw(st.sampled_from(CODECS))
    arrays = [data.draw(hnp.arrays(dtype, shape)) for _ in range(count)]
    present = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    events = [
        {"a": array if there else None, "number": np.array(number)}
        for number, (array, there) in enumerate(zip(arrays, present, strict=True))
    ]
    messages = stream(events, batch, codec)
    assert len(messages) == -(-count // batch)
    assert [int(one) for one in rows(messages, "number", datasets)] == list(range(count))
    for got, sent in zip(rows(messages, "a", datasets), events, strict=True):
        if sent["a"] is None:
            assert got is None
        else:
            assert got is not None
            assert np.asarray(got).dtype == dtype
            assert np.asarray(got).tobytes() == sent["a"].tobytes()


@SLOW
@given(
    arrays=st.lists(
        st.one_of(
            hnp.arrays(np.float32, (32, 40), elements=st.floats(-1e4, 1e4, width=32)),
            hnp.arrays(np.float32, (32, 40), elements=st.floats(width=32)),
        ),
        min_size=1,
        max_size=4,
    ),
    accuracy=st.sampled_from([0.01, 0.5, 20.0]),
)
def test_lossy_zfp_stays_within_its_bound(datasets: Any, arrays: list[Any], accuracy: float) -> None:
    (message,) = stream([{"a": array} for array in arrays], 4, "zfp", zfp_accuracy=accuracy)
    got = datasets(message)["/x/a"]
    for back, sent in zip(got, arrays, strict=True):
        if back.tobytes() != sent.tobytes():
            assert np.abs(back.astype(np.float64) - sent).max() <= accuracy


@SLOW
@given(
    lengths=st.lists(st.one_of(st.none(), st.integers(0, 50)), min_size=1, max_size=12),
    batch=st.integers(1, 5),
    codec=st.sampled_from(CODECS),
)
def test_ragged_values_come_back_with_their_lengths(
    datasets: Any, lengths: list[int | None], batch: int, codec: str | None
) -> None:
    events = [
        {"number": np.array(number), "r": None if length is None else Ragged(np.arange(length) + 100.0 * number)}
        for number, length in enumerate(lengths)
    ]
    got: list[Any] = []
    for message in stream(events, batch, codec):
        content = datasets(message)
        count = len(content["/x/number"])
        if "/x/r" not in content:
            got += [None] * count
            continue
        offsets, missing = content["/x/r_offsets"], content.get("/x/r_missing", np.zeros(count))
        assert len(offsets) == count + 1
        assert offsets[-1] == len(content["/x/r"])
        got += [
            None if missing[row] else content["/x/r"][offsets[row] : offsets[row + 1]].tolist() for row in range(count)
        ]
    assert got == [None if one["r"] is None else one["r"].values.tolist() for one in events]


@SLOW
@given(
    texts=st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20), min_size=1, max_size=8)
)
def test_strings_come_back(datasets: Any, texts: list[str]) -> None:
    messages = stream([{"s": np.array(text)} for text in texts], 3, "gzip")
    assert [str(one) for one in rows(messages, "s", datasets)] == texts


@SLOW
@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(["uint16", "float32"]), st.sampled_from([(), (3,), (4, 70)])), min_size=1, max_size=10
    ),
    codec=st.sampled_from(CODECS),
)
def test_shapes_and_dtypes_may_change_at_any_event(datasets: Any, kinds: list[Any], codec: str | None) -> None:
    events = [{"a": np.full(shape, number, dtype)} for number, (dtype, shape) in enumerate(kinds)]
    got = rows(stream(events, 4, codec), "a", datasets)
    for value, sent in zip(got, events, strict=True):
        assert np.asarray(value).dtype == sent["a"].dtype
        assert np.array_equal(value, sent["a"])
