"""HDF5 messages: what a reader gets is what went in."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import h5py
import numpy as np
import pytest

from lclstreamer import models
from lclstreamer.errors import ComponentError, ConfigurationError
from lclstreamer.events import Channels, Event, Message, Ragged, RunInfo
from lclstreamer.serializers.base import SerializerContext
from lclstreamer.serializers.codecs import BitshuffleCodec
from lclstreamer.serializers.hdf5 import HDF5BinarySerializer
from lclstreamer.serializers.slots import SlotRing

CODECS = [None, "gzip", "gzip_with_shuffle", "bitshuffle_with_lz4", "bitshuffle_with_zstd", "zfp"]


def serializer(fields: dict[str, str], compression: Any = None, **options: Any) -> HDF5BinarySerializer:
    context = SerializerContext("exp=test", "ab" * 32, "1.2.3", rank=2, size=4, timestamps=frozenset({"timestamp"}))
    settings = models.HDF5BinarySerializer(
        type="HDF5BinarySerializer", fields=fields, compression=compression, **options
    )
    return HDF5BinarySerializer(settings, context)


def messages(writer: HDF5BinarySerializer, *values: dict[str, Any], **event: Any) -> list[bytes]:
    made = [took(message) for number, one in enumerate(values) for message in writer.add(Event(one, number, **event))]
    return made + [took(message) for message in writer.end_batch()]


def took(message: Message) -> bytes:
    """The content of a message whose memory is used again from now on."""
    content = bytes(message)
    message.release()
    return content


@pytest.mark.parametrize("compression", CODECS)
@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float32", "float64"]
)
def test_every_codec_gives_every_dtype_back_bit_by_bit(
    dtype: str, compression: str | None, datasets: Callable[[bytes], dict[str, Any]]
) -> None:
    random = np.random.default_rng(5)
    sent = [(random.random((5, 16, 24)) * 200).astype(dtype) for _ in range(3)]
    (message,) = messages(serializer({"a": "/data/a"}, compression), *({"a": one} for one in sent))
    got = datasets(message)["/data/a"]
    assert got.dtype == np.dtype(dtype)
    assert np.array_equal(got, np.stack(sent))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lossy_zfp_stays_within_the_stated_error(dtype: str, datasets: Callable[[bytes], dict[str, Any]]) -> None:
    sent = np.random.default_rng(6).normal(100, 30, (64, 64)).astype(dtype)
    (message,) = messages(serializer({"a": "/a"}, "zfp", zfp_accuracy=0.5), {"a": sent})
    got = datasets(message)["/a"][0]
    assert 0 < np.abs(got - sent).max() <= 0.5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(40, 40), (3, 20, 24), (2, 3, 8, 9)])
def test_what_zfp_cannot_hold_to_its_accuracy_is_stored_as_it_is(
    dtype: str, shape: tuple[int, ...], datasets: Callable[[bytes], dict[str, Any]]
) -> None:
    plain = np.random.default_rng(7).normal(100, 30, shape).astype(dtype)
    sent: list[Any] = [plain]
    for spoilt in (np.nan, np.inf, -np.inf, 1e8, -3e30, np.finfo(dtype).max):
        frame = plain.copy()
        frame.flat[5] = spoilt
        sent += [frame, None, plain]
    (message,) = messages(serializer({"a": "/a"}, "zfp", zfp_accuracy=0.01), *({"a": one} for one in sent))
    with h5py.File(io.BytesIO(message)) as file:
        dataset = file["a"]
        assert dataset.attrs["max_absolute_error"] == 0.01
        masks = [
            dataset.id.get_chunk_info_by_coord((row, *(0 for _ in plain.shape))).filter_mask for row in range(len(sent))
        ]
        got = dataset[:]
    assert [mask == 0 for mask in masks[:3]] == [True, False, False]
    for one, mask, back in zip(sent, masks, got, strict=True):
        if one is None:
            assert np.isnan(back).all()
        elif mask:
            assert back.tobytes() == one.tobytes()
        else:
            assert np.abs(back.astype(np.float64) - one.astype(np.float64)).max() <= 0.01
    assert masks[-1] == 0


def test_zfp_stays_in_use_for_values_it_can_hold(datasets: Callable[[bytes], dict[str, Any]]) -> None:
    frame = np.random.default_rng(8).normal(20_000, 3_000, (64, 64)).astype(np.float32)
    (message,) = messages(serializer({"a": "/a"}, "zfp", zfp_accuracy=0.02), {"a": frame}, {"a": frame})
    assert np.abs(datasets(message)["/a"] - frame).max() <= 0.02
    with h5py.File(io.BytesIO(message)) as file:
        assert file["a"].id.get_chunk_info(0).filter_mask == 0
        assert file["a"].id.get_storage_size() < 2 * frame.nbytes


def test_several_data_sources_of_different_shapes_are_compressed_with_zfp(
    datasets: Callable[[bytes], dict[str, Any]],
) -> None:
    sent = {"a": np.ones((20, 30)), "b": np.ones((4, 30, 5), np.float32)}
    (message,) = messages(serializer({"a": "/a", "b": "/b"}, "zfp"), sent)
    assert all(np.array_equal(datasets(message)[f"/{name}"][0], value) for name, value in sent.items())


def test_a_message_in_memory_used_before_says_for_itself_how_its_chunks_are_stored(
    datasets: Callable[[bytes], dict[str, Any]],
) -> None:
    writer = serializer({"a": "/a"}, "zfp", zfp_accuracy=0.01)
    frame = np.random.default_rng(9).normal(100, 30, (32, 32)).astype(np.float32)
    for spoilt in (np.nan, 100.0, np.nan):
        frame[1, 1] = spoilt
        (message,) = messages(writer, *({"a": frame} for _ in range(writer.context.batch_size)))
        assert np.allclose(datasets(message)["/a"][-1], frame, rtol=0, atol=0.01, equal_nan=True)


def test_the_message_says_where_it_comes_from(datasets: Callable[[bytes], dict[str, Any]]) -> None:
    writer = serializer({"a": "/a"})
    run = RunInfo("mfx100", 7)
    first = datasets(messages(writer, {"a": np.array(1)}, run=run)[0])[""]
    second = datasets(messages(writer, {"a": np.array(1)}, run=run)[0])[""]
    assert first == {
        "experiment": "mfx100",
        "run": 7,
        "rank": 2,
        "sequence": 0,
        "source_identifier": "exp=test",
        "configuration_sha256": "ab" * 32,
        "lclstreamer_version": "1.2.3",
    }
    assert second["sequence"] == 1


def test_times_have_exact_nanoseconds_and_their_epoch(datasets: Callable[[bytes], dict[str, Any]]) -> None:
    writer = serializer({"timestamp": "/t"})
    exact = 1_743_242_400_008_337_333
    (message,) = messages(writer, {"timestamp": np.array(float(exact))}, timestamp_ns=exact)
    assert datasets(message)["/t_ns"].tolist() == [exact]
    with h5py.File(io.BytesIO(message)) as file:
        assert file["t_ns"].attrs["epoch"] == "1970-01-01T00:00:00Z"


def test_strings_of_any_length_and_script_survive(datasets: Callable[[bytes], dict[str, Any]]) -> None:
    sent = [np.array("exp=é"), np.array("longer than the first, Ωμ"), np.array("")]
    (message,) = messages(serializer({"s": "/s"}, "gzip"), *({"s": one} for one in sent))
    assert datasets(message)["/s"].tolist() == [str(one) for one in sent]


def test_arrays_of_strings_survive(datasets: Callable[[bytes], dict[str, Any]]) -> None:
    (message,) = messages(serializer({"s": "/s"}), {"s": np.array(["mfx", "7"])}, {"s": np.array(["tmo", "10"])})
    assert datasets(message)["/s"].tolist() == [["mfx", "7"], ["tmo", "10"]]


def test_events_with_strings_are_added_without_moving_those_before(
    datasets: Callable[[bytes], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = serializer({"s": "/s", "n": "/n", "a": "/a"}, "gzip")
    moved = []
    move = HDF5BinarySerializer._moved
    monkeypatch.setattr(writer, "_moved", lambda *given: moved.append(writer._batch) or move(writer, *given))
    texts = [f"shot {number}" for number in range(8)]
    (message,) = messages(writer, *({"s": np.array(text), "n": 7, "a": np.full((20, 20), 3.0)} for text in texts))
    assert datasets(message)["/s"].tolist() == texts
    assert not moved


@pytest.mark.parametrize(
    ("dtype", "filled"), [("float32", np.nan), ("int32", -999), ("uint16", 0), ("int8", 0), ("bool", False)]
)
def test_a_missing_value_is_filled_and_marked(
    dtype: str, filled: Any, datasets: Callable[[bytes], dict[str, Any]]
) -> None:
    one = np.ones((2, 3), dtype)
    (message,) = messages(serializer({"a": "/x/a"}), {"a": None}, {"a": one}, {"a": None})
    got = datasets(message)
    assert got["/x/a_missing"].tolist() == [1, 0, 1]
    assert got["/x/a"].dtype == np.dtype(dtype)
    assert np.array_equal(got["/x/a"][1], one)
    assert np.array_equal(got["/x/a"][0], np.full((2, 3), filled, dtype), equal_nan=got["/x/a"].dtype.kind == "f")


def test_a_data_source_without_any_value_is_named_and_the_message_goes_out(
    datasets: Callable[[bytes], dict[str, Any]],
) -> None:
    (message,) = messages(serializer({"a": "/a", "b": "/b"}), {"a": None, "b": np.array(1)})
    got = datasets(message)
    assert list(got[""]["missing"]) == ["a"]
    assert "/a" not in got
    assert got["/b"].tolist() == [1]


def test_another_shape_or_run_begins_a_new_message(datasets: Callable[[bytes], dict[str, Any]]) -> None:
    writer = serializer({"a": "/a"})
    made = messages(writer, {"a": np.ones(2)}, {"a": np.ones(2)}, {"a": np.ones(3)}, {"a": np.ones(3, np.float32)})
    assert [datasets(one)["/a"].shape for one in made] == [(2, 2), (1, 3), (1, 3)]
    made = [bytes(one) for one in writer.add(Event({"a": np.ones(1)}, 0, RunInfo("x", 1)))]
    made += [bytes(one) for one in writer.add(Event({"a": np.ones(1)}, 1, RunInfo("x", 2)))]
    assert datasets(made[0])[""]["run"] == 1


def test_companions_lie_beside_a_path_however_it_is_spelt(datasets: Callable[[bytes], dict[str, Any]]) -> None:
    (message,) = messages(serializer({"a": "x//a/"}), {"a": None}, {"a": np.array(1)})
    assert set(datasets(message)) == {"", "/x/a", "/x/a_missing"}


def test_a_field_in_the_way_of_exact_times_is_refused_also_for_times_of_other_packages() -> None:
    with pytest.raises(ConfigurationError, match="/t_ns is where the nanoseconds of timestamp are"):
        serializer({"timestamp": "/t", "a": "/t_ns"})


def test_only_configured_fields_are_sent(datasets: Callable[[bytes], dict[str, Any]]) -> None:
    (message,) = messages(serializer({"a": "/a"}), {"a": np.array(1), "b": np.array(2)})
    assert set(datasets(message)) == {"", "/a"}


def test_a_field_the_pipelines_took_away_is_an_error_that_says_what_is_there() -> None:
    with pytest.raises(ComponentError, match=r"data_serializer.fields.a: events have no a after the pipelines; .* b"):
        messages(serializer({"a": "/a"}), {"b": np.array(2)})


def test_what_is_no_number_or_string_is_refused() -> None:
    with pytest.raises(ComponentError, match="a: object values cannot be stored"):
        messages(serializer({"a": "/a"}), {"a": np.array([{}], dtype=object)})


def test_waveforms_without_a_fex_pipeline_are_refused_with_the_remedy() -> None:
    with pytest.raises(ComponentError, match="put a FexPipeline before the serializer"):
        messages(serializer({"a": "/a"}), {"a": Channels((np.zeros(3),), (0,))})


def test_waiting_for_memory_is_counted_while_it_lasts() -> None:
    writer = serializer({"a": "/a"})
    writer.ring = SlotRing(2, stop := threading.Event())
    writer.add(Event({"a": np.ones(3)}, 0))
    (held,) = writer.end_batch()
    writer.add(Event({"a": np.ones(3)}, 1))
    timer = threading.Timer(0.3, stop.set)
    timer.start()
    assert list(writer.end_batch())
    assert writer.waited_s >= 0.2
    timer.join()
    held.release()


def test_an_event_may_be_reused_after_it_was_added(datasets: Callable[[bytes], dict[str, Any]]) -> None:
    writer = serializer({"a": "/a"})
    scratch = np.zeros(4)
    for number in range(3):
        scratch[:] = number
        assert not list(writer.add(Event({"a": scratch}, number)))
    (message,) = writer.end_batch()
    assert datasets(bytes(message))["/a"][:, 0].tolist() == [0, 1, 2]


@pytest.fixture
def slow_codec(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Compressing waits until the event is set."""
    go, encode = threading.Event(), BitshuffleCodec.encode

    def wait_then_encode(self: BitshuffleCodec, *arguments: Any) -> Any:
        assert go.wait(30)
        return encode(self, *arguments)

    monkeypatch.setattr(BitshuffleCodec, "encode", wait_then_encode)
    return go


def test_the_next_batch_begins_while_the_last_one_is_compressed(
    slow_codec: threading.Event, datasets: Callable[[bytes], dict[str, Any]]
) -> None:
    writer = serializer({"a": "/a"}, "bitshuffle_with_lz4")
    writer.context = replace(writer.context, batch_size=2)
    values = np.arange(40_000, dtype=np.uint16).reshape(4, 100, 100)
    made = []
    for number in (0, 2):
        writer.add(Event({"a": values[number]}, number))
        writer.add(Event({"a": values[number + 1]}, number + 1))
        made += writer.end_batch()
    assert [message.ready for message in made] == [False, False]
    slow_codec.set()
    assert [datasets(bytes(message))["/a"].tolist() for message in made] == [values[:2].tolist(), values[2:].tolist()]
    assert [message.ready for message in made] == [True, True]
    writer.close()


def test_memory_that_is_being_compressed_into_is_not_used_again(slow_codec: threading.Event) -> None:
    writer = serializer({"a": "/a"}, "bitshuffle_with_lz4")
    writer.context = replace(writer.context, batch_size=1)
    writer.ring = SlotRing(1, threading.Event())
    writer.add(Event({"a": np.ones((100, 100))}, 0))
    (message,) = writer.end_batch()
    nobody_wants_it = threading.Thread(target=message.release)
    nobody_wants_it.start()
    nobody_wants_it.join(0.2)
    assert nobody_wants_it.is_alive()
    slow_codec.set()
    nobody_wants_it.join(30)
    writer.add(Event({"a": np.ones((100, 100))}, 1))
    assert writer.ring.waited_s == 0
    writer.close()


def test_compressing_that_fails_is_an_error_that_names_the_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("bitshuffle failed with code -80")

    monkeypatch.setattr(BitshuffleCodec, "encode", fail)
    writer = serializer({"a": "/data/a"}, "bitshuffle_with_lz4")
    writer.add(Event({"a": np.ones((100, 100))}, 0))
    (message,) = writer.end_batch()
    with pytest.raises(ComponentError, match="compressing /data/a failed: bitshuffle failed with code -80"):
        bytes(message)
    writer.close()


def test_no_events_make_no_message() -> None:
    assert not list(serializer({"a": "/a"}).end_batch())


@pytest.mark.parametrize("compression", ["bitshuffle_with_lz4", "gzip_with_shuffle", "zfp"])
def test_another_process_reads_the_file(tmp_path: Any, compression: str) -> None:
    sent = np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32)
    path = tmp_path / "message.h5"
    path.write_bytes(messages(serializer({"a": "/a"}, compression), {"a": sent})[0])
    code = f"import h5py, hdf5plugin; print(float(h5py.File({str(path)!r})['a'][:].astype('f8').sum()))"
    assert float(subprocess.check_output([sys.executable, "-c", code])) == pytest.approx(float(sent.astype("f8").sum()))


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="h5dump (hdf5-tools) is not installed")
@pytest.mark.parametrize("compression", [None, "gzip_with_shuffle"])
def test_the_hdf5_groups_own_tool_reads_the_file(tmp_path: Any, compression: str | None) -> None:
    writer = serializer({"a": "/data/a", "r": "/data/deep/r", "s": "/s"}, compression)
    events = [
        {"a": np.full((20, 30), number, np.uint16), "r": Ragged(np.arange(number)), "s": np.array(f"shot {number}")}
        for number in range(1, 4)
    ]
    path = tmp_path / "message.h5"
    path.write_bytes(messages(writer, *events)[0])

    def dump(*options: str) -> str:
        return subprocess.run(["h5dump", *options, str(path)], check=True, capture_output=True, text=True).stdout

    assert "2, 2, 2, 2" in dump("-d", "/data/a", "-s", "1,5,5", "-c", "1,1,4")
    assert "0, 0, 1, 0, 1, 2" in dump("-d", "/data/deep/r")
    assert "0, 1, 3, 6" in dump("-d", "/data/deep/r_offsets")
    assert '"shot 1", "shot 2", "shot 3"' in dump("-d", "/s")
    assert "DATASPACE  SIMPLE { ( 6 ) / ( 6 ) }" in dump("-H", "-d", "/data/deep/r")
