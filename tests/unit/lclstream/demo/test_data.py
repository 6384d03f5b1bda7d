"""A configuration is made from what is in a run, and the engine accepts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lclstream.demo.data import RunDescription, stream_configuration
from lclstreamer.config import Parameters


def described(*detectors: dict[str, Any]) -> RunDescription:
    return RunDescription.model_validate({"experiment": "tmo", "run": 1, "events": 9, "detectors": list(detectors)})


def detector(name: str, *fields: tuple[str, list[int], str]) -> dict[str, Any]:
    return {
        "name": name,
        "type": name,
        "algorithm": "raw",
        "fields": [{"name": field, "shape": shape, "dtype": dtype} for field, shape, dtype in fields],
    }


def test_the_largest_image_is_streamed_with_its_pulse_energy() -> None:
    run = described(
        detector("opal", ("image", [64, 64], "uint16")),
        detector("jungfrau", ("raw", [1, 512, 1024], "uint16"), ("hot_pixels", [], "int64")),
        detector("ebeam", ("energy", [], "float64")),
        detector("gmd", ("milliJoulesPerPulse", [], "float64")),
    )
    config = stream_configuration(run, Path("/data/run.xtc2"))
    assert config["source_identifier"] == "files=/data/run.xtc2"
    assert config["data_sources"]["detector_data"]["psana_fields"] == "raw.raw"
    assert config["data_sources"]["pulse_energy"]["psana_name"] == "gmd"
    Parameters.model_validate({**config, "data_handlers": [{"type": "BinaryFileWritingDataHandler"}]})


def test_a_digitizer_is_streamed_where_there_is_no_image() -> None:
    run = described(detector("hsd", ("waveform", [130720], "float32")))
    config = stream_configuration(run, Path("/data/run.xtc2"))
    assert config["data_sources"]["detector_data"]["psana_name"] == "hsd"
    assert "pulse_energy" not in config["data_sources"]


def test_nothing_to_stream_is_seen() -> None:
    run = described(detector("ebeam", ("energy", [], "float64")))
    assert run.image() is None
    assert run.waveform() is None
