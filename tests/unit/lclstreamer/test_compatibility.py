"""Users of the original engine change nothing: its options have its defaults, and messages are read by its readers."""

from __future__ import annotations

import io
import os
import re
import warnings
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
import yaml

from lclstreamer import config, models, pipeline_models
from lclstreamer.engine import Engine
from lclstreamer.errors import ConfigurationError
from lclstreamer.events import Event, RunInfo
from lclstreamer.serializers.base import SerializerContext
from lclstreamer.serializers.hdf5 import HDF5BinarySerializer

#: A checkout of the original engine; its example files are then read as they are.
REFERENCE = os.environ.get("LCLSTREAMER_REFERENCE", "")

#: What an option of the original is when the configuration does not name it.
DEFAULTS = {
    pipeline_models.PeaknetPreprocessingPipeline: (
        {"batch_size": 1, "target_height": 2, "target_width": 3},
        {"pad_style": "center", "add_channel_dim": True, "num_channels": 1},
    ),
    models.HDF5BinarySerializer: ({"fields": {"a": "/a"}}, {"compression": None, "compression_level": 3}),
    models.BinaryDataStreamingDataHandler: (
        {"urls": ["tcp://127.0.0.1:1"]},
        {"role": "server", "library": "zmq", "socket_type": "push"},
    ),
    models.BinaryFileWritingDataHandler: ({}, {"file_prefix": "", "file_suffix": "h5", "write_directory": Path.cwd()}),
    models.Psana2DetectorInterface: ({"psana_name": "gmd", "psana_fields": "raw.x"}, {"dtype": "float64"}),
    models.Psana1DetectorInterface: ({"psana_name": "gmd", "psana_fields": "raw.x"}, {"dtype": "float64"}),
}

COMMON = """
skip_incomplete_events: true
data_handlers: [{type: BinaryDataStreamingDataHandler, urls: ["tcp://node1:12321"], role: client, socket_type: push}]
"""
SIMPLON = """
source_identifier: exp=mfx1,run=51
event_source: {type: Psana2EventSource}
data_sources:
  timestamp: {type: Psana2Timestamp}
  detector_data: {type: Psana2DetectorInterface, psana_name: jungfrau, psana_fields: raw.calib}
  photon_wavelength: {type: Psana2DetectorInterface, psana_name: "SIOC:SYS0:ML00:AO192"}
  detector_geometry:
    {type: Psana2DetectorInterface, psana_name: jungfrau, psana_fields: [_detid, raw._det_geotxt_default], dtype: str}
  beam_data:
    {type: Psana2DetectorInterface, psana_name: ebeamh, psana_fields: [raw.ebeamUndAngX, raw.ebeamL3Energy]}
  run_info: {type: Psana2RunInfo}
processing_pipeline: {type: BatchProcessingPipeline, batch_size: 1}
data_serializer:
  type: SimplonBinarySerializer
  data_source_to_serialize: detector_data
  polarization_fraction: 0
  polarization_axis: [1.0, 0.0, 0.0]
  data_collection_rate: 120Hz
  detector_name: jungfrau
  detector_type: AreaDetector
"""
PEAKNET = """
source_identifier: exp=mfx2:run=27
event_source: {type: Psana1EventSource}
data_sources:
  timestamp: {type: Psana1Timestamp}
  detector_data: {type: Psana1DetectorInterface, psana_name: epix10k2M, psana_fields: image}
  random: {type: GenericRandomNumpyArray, array_shape: "4,4,4", array_dtype: float32}
  photon_wavelength: {type: Psana1DetectorInterface, psana_name: "SIOC:SYS0:ML00:AO192"}
processing_pipeline: {type: PeaknetPreprocessingPipeline, batch_size: 16, target_height: 2048, target_width: 2048}
data_serializer: {type: HDF5BinarySerializer, compression: zfp, fields: {timestamp: /data/t, detector_data: /data/data}}
"""
DIGITIZER = """
source_identifier: exp=tmo3,run=44
event_source: {type: Psana2EventSource}
data_sources:
  timestamp: {type: Psana2Timestamp}
  camera: {type: Psana2DetectorInterface, psana_name: tmo_fzppiranha, psana_fields: raw.raw}
  pulse_energy: {type: Psana2DetectorInterface, psana_name: gmd, psana_fields: raw.milliJoulesPerPulse}
processing_pipeline: {type: BatchProcessingPipeline, batch_size: 10}
data_serializer:
  {type: HDF5BinarySerializer, compression_level: 3, fields: {timestamp: /timestamp, camera: //camera, pulse_energy: e}}
"""


@pytest.mark.parametrize("model", DEFAULTS, ids=lambda model: model.__name__)
def test_an_option_that_is_not_named_is_what_the_original_takes(model: Any) -> None:
    needed, expected = DEFAULTS[model]
    made = model(type=model.__name__, **needed)
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize("text", [SIMPLON, PEAKNET, DIGITIZER], ids=["simplon", "peaknet", "digitizer"])
def test_configurations_as_the_original_has_them_are_taken_without_a_word(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.from_mapping(yaml.safe_load(text + COMMON))


def internal(**changes: Any) -> dict[str, Any]:
    """A configuration of three made events with the data sources `x`, `y` and `s`, and the sections given instead."""
    return {
        "source_identifier": "here",
        "skip_incomplete_events": False,
        "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": 3},
        "data_sources": {
            "x": {"type": "IntValue", "value": 1},
            "y": {"type": "FloatValue", "value": 2},
            "s": {"type": "SourceIdentifier"},
        },
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 3},
        "data_serializer": {"type": "HDF5BinarySerializer", "fields": {"x": "/x"}},
        "data_handlers": [{"type": "BinaryFileWritingDataHandler"}],
    } | changes


def test_fields_of_data_sources_that_are_not_there_are_ignored_with_a_warning(tmp_path: Path, datasets: Any) -> None:
    content = internal(
        data_serializer={"type": "HDF5BinarySerializer", "fields": {"x": "/x", "camera": "/camera", "yy": "/y"}},
        data_handlers=[{"type": "BinaryFileWritingDataHandler", "write_directory": str(tmp_path)}],
    )
    with pytest.warns(config.ConfigurationWarning) as caught:
        parameters = config.from_mapping(content)
    texts = [str(one.message) for one in caught]
    assert [text.partition(":")[0] for text in texts] == ["data_serializer.fields.camera", "data_serializer.fields.yy"]
    assert "no data source has this name, nothing is stored at /y; there are x, y, s" in texts[1]
    engine = Engine(parameters)
    engine.open()
    engine.run()
    found = datasets((tmp_path / "r0_0.h5").read_bytes())
    assert found.keys() == {"", "/x"}
    assert "missing" not in found[""]


def test_fields_of_which_none_is_there_are_refused() -> None:
    fields = {"type": "HDF5BinarySerializer", "fields": {"a": "/a", "xx": "/x"}}
    with pytest.raises(ConfigurationError, match=r"fields.a: no data source has this name(.|\n)*fields.xx: no data"):
        config.from_mapping(internal(data_serializer=fields))


@pytest.mark.parametrize("given", [3.5, 3.0, "3", 3])
def test_an_integer_is_what_the_original_makes_of_it(given: Any) -> None:
    content = internal(data_sources={"x": {"type": "IntValue", "value": given}})
    if given == 3.5:
        with pytest.warns(config.ConfigurationWarning, match="data_sources.x.value: 3.5 is no whole number .* 3"):
            parameters = config.from_mapping(content)
    else:
        parameters = config.from_mapping(content)
    section: Any = parameters.data_sources["x"]
    assert section.value == int(np.array(given, dtype=np.int_))


@pytest.mark.parametrize("given", [float("nan"), float("inf"), "3.5", 2**63, -1e30])
def test_a_value_that_the_original_cannot_make_an_integer_of_is_refused(given: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"data_sources.x.value: "):
        config.from_mapping(internal(data_sources={"x": {"type": "IntValue", "value": given}}))


DTYPES = re.findall(
    r"\S+",
    "native str str_ bytes bytes_ bool bool_ byte ubyte short ushort intc uintc int int_ uint intp uintp long ulong "
    "longlong ulonglong half single double longdouble float complex csingle cdouble clongdouble "
    "int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128 "
    "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16 <i4 >f8 =u2 |u1 >c8 "
    "? b B h H i I l L q Q p P n N e f d g F D G U S U100 S200 <U5 |S3",
)


@pytest.mark.parametrize("name", [None, *DTYPES])
def test_every_dtype_of_numbers_and_strings_that_numpy_knows_is_taken(name: str | None) -> None:
    section = models.Psana2DetectorInterface.model_validate(
        {"type": "Psana2DetectorInterface", "psana_name": "gmd", "psana_fields": "raw.x", "dtype": name}
    )
    assert section.dtype == (name or "native")
    if section.dtype != "native":
        assert np.dtype(section.dtype).kind in "biufcSU"


@pytest.mark.parametrize(
    "name", ["d4", "u", "i3", "f3", "int128", "float8", "O", "object", "M8", "V4", "U-1", "U99999999", "x", ""]
)
def test_what_is_no_dtype_of_numbers_or_strings_is_refused_in_words(name: str) -> None:
    source = {"type": "HDF5Dataset", "path": "/x", "dtype": name}
    with pytest.raises(ConfigurationError, match=f"data_sources.x.dtype: '{name}': is no numpy dtype .* e.g. float32"):
        config.from_mapping(
            internal(
                event_source={"type": "HDF5EventSource"},
                source_identifier="files=/data",
                data_sources={"x": source},
            )
        )


@pytest.mark.parametrize("name", ["longlong", "intc", "ulong", "longdouble", ">i2", "native", None])
def test_random_numbers_are_of_any_integer_or_floating_dtype(name: str | None) -> None:
    from lclstreamer.sources.generic import GenericRandomNumpyArray

    options = {"type": "GenericRandomNumpyArray", "array_shape": "3", "array_dtype": name}
    source = GenericRandomNumpyArray("x", models.GenericRandomNumpyArray.model_validate(options), {})
    assert source.get(None).dtype == np.dtype("float64" if name in (None, "native") else name)


@pytest.mark.skipif(not REFERENCE, reason="LCLSTREAMER_REFERENCE names no checkout of the original engine")
def test_the_originals_own_examples_are_taken() -> None:
    examples = sorted((Path(REFERENCE) / "examples").glob("*.y*ml"))
    assert examples
    refused = {}
    for path in examples:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one of them has an older form
            try:
                config.load(path)
            except ConfigurationError as error:
                refused[path.name] = str(error)
    # That one reads psana2 data sources from psana1 events, which the original cannot do either.
    assert set(refused) <= {"lclstreamer-psana1-simplon.yml"}, refused


def stored(compression: str | None, values: Any) -> h5py.File:
    """The message of our serializer with the original's defaults."""
    settings = models.HDF5BinarySerializer(
        type="HDF5BinarySerializer", fields={"a": "/data/a"}, compression=compression
    )
    writer = HDF5BinarySerializer(settings, SerializerContext("exp=a", "ab" * 32, "1", batch_size=len(values)))
    for index, value in enumerate(values):
        writer.add(Event({"a": value}, index, RunInfo("a", 1), None))
    (message,) = writer.end_batch()
    file = h5py.File(io.BytesIO(bytes(message)))
    writer.close()
    return file


@pytest.mark.parametrize(
    ("compression", "filters"),
    [
        (None, {}),
        ("gzip", {"compression": "gzip", "compression_opts": 3}),
        ("gzip_with_shuffle", {"compression": "gzip", "compression_opts": 3, "shuffle": True}),
        ("bitshuffle_with_lz4", {"compression": hdf5plugin.Bitshuffle(cname="lz4", clevel=3)}),
        ("bitshuffle_with_zstd", {"compression": hdf5plugin.Bitshuffle(cname="zstd", clevel=3)}),
    ],
)
def test_datasets_have_the_chunks_and_filters_that_the_original_gives_them(
    compression: str | None, filters: dict[str, Any]
) -> None:
    values = np.random.default_rng(1).integers(0, 1000, (4, 32, 48)).astype(np.float64)
    with (
        h5py.File("reference", "w", driver="core", backing_store=False) as reference,
        stored(compression, values) as ours,
    ):
        reference.create_dataset("/data/a", data=values, chunks=(1, 32, 48), **filters)
        # Uncompressed data lie in one piece, which every reader takes and is written faster.
        for key in ("dtype", "shape", *(("chunks",) if compression else ())):
            assert getattr(ours["/data/a"], key) == getattr(reference["/data/a"], key)
        assert pipeline(ours["/data/a"]) == pipeline(reference["/data/a"])
        assert np.array_equal(ours["/data/a"][:], reference["/data/a"][:])


def pipeline(dataset: h5py.Dataset) -> list[Any]:
    """Number and options of each of a dataset's filters."""
    properties = dataset.id.get_create_plist()
    found = [properties.get_filter(number) for number in range(properties.get_nfilters())]
    return [(code, options) for code, _, options, _ in found]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_zfp_by_default_gives_the_values_of_which_the_original_gives_all_but_the_last_bits(dtype: str) -> None:
    values = np.random.default_rng(2).normal(0, 1e3, (3, 32, 48)).astype(dtype)
    with h5py.File("reference", "w", driver="core", backing_store=False) as reference, stored("zfp", values) as ours:
        reference.create_dataset("/data/a", data=values, chunks=(1, 32, 48), compression=hdf5plugin.Zfp())
        reference.flush()
        assert [code for code, _ in pipeline(ours["/data/a"])] == [code for code, _ in pipeline(reference["/data/a"])]
        assert np.array_equal(ours["/data/a"][:], values)
        limit = float(np.abs(values).max()) * 4 * float(np.finfo(dtype).eps)
        np.testing.assert_allclose(reference["/data/a"][:], ours["/data/a"][:], rtol=0, atol=limit)
