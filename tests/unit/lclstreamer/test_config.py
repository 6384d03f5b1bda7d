"""The configuration: what is accepted, and what errors say."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from lclstreamer import config, identifiers
from lclstreamer.config import OlderSpellingWarning, Parameters
from lclstreamer.errors import ConfigurationError


def problems(data: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        config.from_mapping(data, origin="run.yaml")
    return str(caught.value)


def test_importing_the_configuration_needs_only_pydantic_and_yaml() -> None:
    heavy = ("numpy", "h5py", "psana", "mpi4py", "zmq", "pynng", "typer")
    code = f"import sys, lclstreamer.config; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_file_in_yaml_or_json_is_loaded(tmp_path: Path, internal: dict[str, Any]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(internal))
    parameters = config.load(path)
    assert parameters.event_source.number_of_events_to_generate == 25
    other = tmp_path / "run.json"
    other.write_text(parameters.model_dump_json())
    assert config.load(other) == parameters


def test_the_fingerprint_depends_on_content_not_on_order(internal: dict[str, Any]) -> None:
    first = config.from_mapping(internal)
    turned = config.from_mapping(dict(reversed(internal.items())))
    internal["processing_pipeline"]["batch_size"] = 11
    assert first.sha256() == turned.sha256() != config.from_mapping(internal).sha256()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml does not exist"):
        config.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["a: [1", "", "- 1"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"run\.yaml"):
        config.load(path)


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        ("processing_pipeline.batch_size", "ten", r"run.yaml: processing_pipeline.batch_size: 'ten': input should be"),
        ("processing_pipeline.batchsize", 3, "unknown key; known here: type, batch_size; did you mean batch_size?"),
        ("processing_pipeline.type", "BatchPipeline", "'BatchPipeline' is not a type; valid: BatchProcessingPipeline"),
        ("data_sources.number.value", None, "data_sources.number.value: None: "),
        ("data_sources.number.type", "IntVal", "data_sources.number.type: 'IntVal' is not a type"),
        ("data_sources.random.array_shape", "4,x", "whole numbers joined by commas"),
        ("data_sources.random.array_dtype", "float33", "data_sources.random.array_dtype: 'float33'"),
        ("data_serializer.compression", "lz4", "should be 'gzip'"),
        ("data_serializer.fields", {"randm": "/r"}, "data_serializer.fields.randm: no data source has this name"),
        ("data_serializer.fields", {"random": "/a", "number": "/a/b"}, "in each other's way"),
        ("data_serializer.fields", {"random": "//"}, "is not a dataset path"),
        ("data_handlers", [], "data_handlers: "),
        ("event_source.type", "Psana2EventSource", "number_of_events_to_generate: unknown key"),
        ("data_sources.number.type", "Psana2Timestamp", "reads events of Psana2EventSource only"),
    ],
)
def test_an_error_names_file_place_value_and_remedy(
    internal: dict[str, Any], place: str, value: Any, expected: str
) -> None:
    node = internal
    *way, last = place.split(".")
    for word in way:
        node = node[word]
    node[last] = value
    if last == "type" and value == "Psana2Timestamp":
        del node["value"]
    assert expected in problems(internal)


TIME = {"type": "HDF5Timestamp", "path": "/t"}
WAVES = {"type": "HDF5Dataset", "path": "/w"}
FEX = {"type": "FexPipeline", "data_source": "w", "form": "waveform"}
COUNTING = {
    "type": "ElectronCountingPipeline",
    "data_source": "w",
    "background_threshold": 1,
    "xray_threshold": 9,
}
BATCH = {"type": "BatchProcessingPipeline", "batch_size": 10}


def archive(internal: dict[str, Any], fields: dict[str, str], *pipelines: dict[str, Any], skip: bool = False) -> Any:
    """A configuration of an archived run with a time `t`, waveforms `w`, and `x`."""
    return internal | {
        "source_identifier": "files=/data",
        "skip_incomplete_events": skip,
        "event_source": {"type": "HDF5EventSource"},
        "data_sources": {"t": TIME, "w": WAVES, "x": {"type": "IntValue", "value": 1}},
        "processing_pipeline": [*pipelines, BATCH],
        "data_serializer": {"type": "HDF5BinarySerializer", "fields": fields},
    }


@pytest.mark.parametrize(
    ("fields", "pipelines", "skip", "expected"),
    [
        ({"t": "/t", "x": "/t_ns"}, [], True, "data_serializer.fields.x: /t_ns is where the nanoseconds of t are"),
        ({"t": "t", "x": "/t_ns/x"}, [], True, "data_serializer.fields.x: /t_ns/x is where the nanoseconds of t are"),
        ({"w": "//w/", "x": "w_missing"}, [], False, "/w_missing is where it is marked which values of w are missing"),
        ({"w_samples": "/s", "x": "/s_offsets"}, [FEX], True, "/s_offsets is where it is said which of w_samples are"),
        ({"w_electrons": "/e", "x": "/e_offsets"}, [COUNTING], True, "/e_offsets is where it is said which"),
    ],
)
def test_paths_that_the_serializer_needs_itself_are_refused_at_start(
    internal: dict[str, Any], fields: dict[str, str], pipelines: list[Any], skip: bool, expected: str
) -> None:
    assert expected in problems(archive(internal, fields, *pipelines, skip=skip))


@pytest.mark.parametrize(
    ("path", "skip"), [("/w_missing", True), ("/w_ns", False), ("/w_offsets", False), ("/w_missing_x", False)]
)
def test_paths_that_are_never_in_the_way_are_taken(internal: dict[str, Any], path: str, skip: bool) -> None:
    config.from_mapping(archive(internal, {"w": "/w", "x": path}, skip=skip))


@pytest.mark.parametrize("pipeline", [FEX, COUNTING], ids=lambda one: one["type"])
def test_what_a_pipeline_has_replaced_is_refused_behind_it(internal: dict[str, Any], pipeline: dict[str, Any]) -> None:
    threshold = {"type": "ThresholdPipeline", "data_source": "w", "threshold": 3}
    config.from_mapping(archive(internal, {"x": "/x"}, threshold, pipeline))
    text = problems(archive(internal, {"x": "/x", "w": "/w"}, pipeline, threshold))
    kind = pipeline["type"]
    assert f"processing_pipeline[1].data_source: 'w' is no data source here: {kind} has replaced it; there are " in text
    assert f"data_serializer.fields.w: {kind} has replaced w; there are t, x, w_" in text


def test_a_missing_key_is_named(internal: dict[str, Any]) -> None:
    del internal["data_serializer"]
    assert "run.yaml: data_serializer: this key is missing" in problems(internal)


def test_errors_inside_lists_have_their_number(internal: dict[str, Any]) -> None:
    internal["data_handlers"].append({"type": "BinaryDataStreamingDataHandler", "urls": ["here"], "role": "boss"})
    text = problems(internal)
    assert "data_handlers[1].urls: ['here']: 'here' is not an address" in text
    assert "data_handlers[1].role: 'boss'" in text


def test_two_pipelines_of_a_list_may_not_both_batch(internal: dict[str, Any]) -> None:
    internal["processing_pipeline"] = [internal["processing_pipeline"]] * 2
    assert "both batch" in problems(internal)


def test_a_pipeline_is_accepted_with_and_without_a_list(internal: dict[str, Any]) -> None:
    one = config.from_mapping(internal).pipelines
    internal["processing_pipeline"] = [internal["processing_pipeline"]]
    assert config.from_mapping(internal).pipelines == one


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("exp=mfx1,run=7", {"exp": "mfx1", "run": 7}),
        ("exp=mfx1, run=7, dir=/data, max_events=3", {"dir": "/data", "max_events": 3}),
        ("files=/data/run7.xtc2", {"files": "/data/run7.xtc2"}),
        ("shmem=tag", {"shmem": "tag"}),
    ],
)
def test_psana2_identifiers_are_understood(text: str, expected: dict[str, Any]) -> None:
    found = identifiers.parse_psana2(text)
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not understood"),
        ("exp=mfx1,runn=7", "not understood"),
        ("exp=mfx1,run=seven", "whole number"),
        ("run=7", "exactly one of"),
        ("exp=a,files=b", "exactly one of"),
        ("files=a,run=7", "belongs to exp="),
    ],
)
def test_wrong_psana2_identifiers_are_explained(internal: dict[str, Any], text: str, expected: str) -> None:
    internal["event_source"] = {"type": "Psana2EventSource"}
    internal["source_identifier"] = text
    assert "source_identifier: " in problems(internal)
    assert expected in problems(internal)


def test_files_may_be_a_folder_a_pattern_or_several(tmp_path: Path) -> None:
    for name in ("a.xtc2", "b.xtc2", "c.txt"):
        (tmp_path / name).touch()
    both = [tmp_path / "a.xtc2", tmp_path / "b.xtc2"]
    for text in (f"{tmp_path}", f"{tmp_path}/*.xtc2", f"{both[0]};{both[1]}"):
        assert identifiers.parse_psana2(f"files={text}").paths() == both
    for text in (f"{tmp_path}/d.xtc2", f"{tmp_path}/*.h5"):
        with pytest.raises(FileNotFoundError):
            identifiers.parse_psana2(f"files={text}").paths()


OLDER = textwrap.dedent("""
    lclstreamer:
      source_identifier: exp=xpptut15:run=430
      event_source: Psana1EventSource
      processing_pipeline: NoOpProcessingPipeline
      data_serializer: HDF5Serializer
      skip_incomplete_events: false
      data_handlers: [BinaryDataStreamingDataHandler]
    data_sources:
      timestamp: {type: Psana1Timestamp}
      raw: {type: Psana1AreaDetector, psana_name: Jungfrau1M, calibration: false}
      image: {type: Psana1AssembledAreaDetector, psana_name: Jungfrau1M}
      wavelength: {type: Psana1PV, psana_name: "SIOC:SYS0:ML00:AO192"}
    event_source: {Psana1EventSource: {}}
    processing_pipeline: {NoOpProcessingPipeline: {}}
    data_serializer:
      HDF5Serializer: {compression: zfp, compression_level: 3, fields: {timestamp: /t, raw: /r, image: /i}}
    data_handlers:
      BinaryDataStreamingDataHandler: {url: "tcp://127.0.0.1:5000", role: client}
    """)


def test_older_spellings_are_accepted_with_the_new_form_in_the_warning() -> None:
    with pytest.warns(OlderSpellingWarning) as caught:
        parameters = config.from_mapping(yaml.safe_load(OLDER))
    told = "\n".join(str(warning.message) for warning in caught)
    for text in ("BatchProcessingPipeline", "HDF5BinarySerializer", "psana_fields: image", "type: CLASS"):
        assert text in told
    assert parameters.data_sources["raw"].psana_fields == "raw"
    assert parameters.data_sources["wavelength"].psana_fields is None
    assert parameters.pipelines[0].batch_size == 1
    assert parameters.data_handlers[0].urls == ["tcp://127.0.0.1:5000"]


@pytest.mark.parametrize(
    ("older", "fields"),
    [
        ({"type": "Psana2AreaDetector", "calibration": True}, "raw.calib"),
        ({"type": "Psana2AssembledAreaDetector"}, "raw.image"),
        ({"type": "Psana2Camera"}, "raw.raw"),
        ({"type": "Psana2Gmd", "psana_function": "milliJoulesPerPulse"}, "raw.milliJoulesPerPulse"),
    ],
)
def test_older_detector_types_become_the_detector_interface(
    internal: dict[str, Any], older: dict[str, Any], fields: str
) -> None:
    internal |= {"source_identifier": "exp=a,run=1", "event_source": {"type": "Psana2EventSource"}}
    internal["data_sources"] = {"random": {"psana_name": "det", **older}}
    internal["data_serializer"]["fields"] = {"random": "/r"}
    with pytest.warns(OlderSpellingWarning):
        parameters = config.from_mapping(internal)
    assert parameters.data_sources["random"].psana_fields == fields
    assert parameters.data_sources["random"].type == "Psana2DetectorInterface"


def test_the_schema_names_every_type() -> None:
    text = str(config.schema())
    for name in ("Psana2EventSource", "IntValue", "PeaknetPreprocessingPipeline", "SimplonBinarySerializer"):
        assert name in text


def test_the_model_is_the_file(internal: dict[str, Any]) -> None:
    again = config.from_mapping(config.from_mapping(internal).model_dump(mode="json"))
    assert isinstance(again, Parameters)
    assert again == config.from_mapping(internal)


@pytest.mark.parametrize("wrong", [["HDF5Serializer"], {"a": 1}, 7, None])
def test_a_type_that_is_no_name_is_refused_by_its_key(wrong: object) -> None:
    document = {"data_serializer": {"type": wrong, "fields": {"a": "/a"}}}
    with pytest.raises(ConfigurationError, match="data_serializer"):
        config.from_mapping(document, origin="request")
