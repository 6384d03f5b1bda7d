"""Which dataset is what."""

from __future__ import annotations

import numpy as np
import pytest

from lclstream.consumers.fields import FieldError, choose, nanoseconds, units_of
from lclstream.consumers.gain import GainBits, decide, split

ARRAYS = {
    "/data/timestamp": np.zeros(3),
    "/data/timestamp_ns": np.zeros(3, np.int64),
    "/data/camera": np.zeros((3, 100, 100), np.uint8),
    "/data/jungfrau": np.zeros((3, 1, 512, 1024), np.uint16),
    "/data/a_position": np.zeros(3),
    "/data/gmd": np.zeros(3),
    "/data/count": np.zeros(3, np.int32),
    "/data/gmd_missing": np.zeros(3, np.uint8),
    "/data/name": np.array(["a", "b", "c"], object),
}


def test_the_likeliest_fields_are_found_by_themselves():
    fields = choose(ARRAYS)
    assert (fields.image, fields.scalar, fields.timestamp) == ("/data/jungfrau", "/data/gmd", "/data/timestamp_ns")
    assert fields.exact


def test_named_fields_win_and_a_time_takes_its_exact_companion():
    fields = choose(ARRAYS, image="data/camera", scalar="/data/a_position", timestamp="/data/timestamp")
    assert (fields.image, fields.scalar, fields.timestamp) == ("/data/camera", "/data/a_position", "/data/timestamp_ns")


def test_a_stream_without_detector_or_scalar_is_no_error():
    fields = choose({"/t": np.zeros(3, np.int32)})
    assert (fields.image, fields.scalar, fields.timestamp) == (None, None, None)


RAGGED = {
    "/data/timestamp": np.zeros(3),
    "/data/hits_times": np.zeros(5),
    "/data/hits_times_offsets": np.array([0, 2, 2, 5], np.uint64),
    "/data/energy": np.zeros(5),
    "/data/energy_offsets": np.array([0, 1, 4, 5], np.uint64),
    "/data/position": np.zeros(3),
}


def test_only_what_has_one_value_an_event_is_chosen():
    fields = choose(RAGGED)
    assert (fields.image, fields.scalar, fields.timestamp) == (None, "/data/position", "/data/timestamp")
    assert not fields.exact


def test_a_dataset_that_only_has_the_name_of_offsets_is_one_like_others():
    arrays = {"/x": np.zeros(3, np.int8), "/x_offsets": np.zeros(3)}
    assert choose(arrays).scalar == "/x_offsets"


@pytest.mark.parametrize("option", ["image", "scalar", "timestamp"])
def test_a_ragged_dataset_that_is_named_is_refused(option):
    with pytest.raises(FieldError, match=rf"--{option} /data/energy is ragged"):
        choose(RAGGED, **{option: "/data/energy"})


@pytest.mark.parametrize(
    ("named", "words"),
    [({"image": "/nope"}, "--image /nope"), ({"image": "/data/gmd"}, "axes"), ({"scalar": "/data/camera"}, "axes")],
)
def test_a_wrong_name_is_told_with_the_option(named, words):
    with pytest.raises(FieldError, match=words):
        choose(ARRAYS, **named)


def test_float_times_become_nanoseconds_by_rounding():
    assert nanoseconds(np.array([1.5]))[0] == 1_500_000_000
    assert nanoseconds(np.array([7], np.int64))[0] == 7


def test_units_come_from_the_message_then_from_the_name():
    assert units_of("/data/gmd", {"/data/gmd": {"units": "J"}}, default="?") == "J"
    assert units_of("/data/gmd", {}, default="?") == "mJ"
    assert units_of("/data/x", {}, default="?") == "?"


@pytest.mark.parametrize(
    ("option", "path", "array", "masked"),
    [
        ("auto", "/data/image", np.zeros((1, 1, 512, 1024), np.uint16), True),
        ("auto", "/data/jungfrau", np.zeros((1, 10, 10), np.uint16), True),
        ("auto", "/data/image", np.zeros((1, 1024, 1024), np.uint16), False),
        ("auto", "/data/jungfrau", np.zeros((1, 512, 1024), np.float32), False),
        ("keep", "/data/jungfrau", np.zeros((1, 512, 1024), np.uint16), False),
        ("mask", "/data/image", np.zeros((1, 10, 10), np.uint16), True),
    ],
)
def test_gain_bits_are_masked_where_there_are_some(option, path, array, masked):
    decision = decide(GainBits(option), path, array)
    assert decision.masked is masked
    assert decision.reason


def test_masking_bits_that_are_not_there_is_refused():
    with pytest.raises(ValueError, match="float32"):
        decide(GainBits.MASK, "/data/image", np.zeros((1, 10, 10), np.float32))


def test_a_pixel_is_split_into_value_and_gain():
    values, switched = split(np.array([100, 100 | 1 << 14, 100 | 3 << 14], np.uint16))
    assert list(values) == [100, 100, 100]
    assert switched == 2
