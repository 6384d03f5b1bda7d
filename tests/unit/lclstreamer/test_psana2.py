"""LCLS-II runs, written by psana's own writer and read through the engine's sources."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lclstreamer import models
from lclstreamer.errors import ConfigurationError, SourceError
from lclstreamer.events import Event
from lclstreamer.sources import _psana, psana2_simulator
from lclstreamer.sources.base import SourceContext
from lclstreamer.sources.psana2 import Psana2EventSource
from lclstreamer.sources.psana2_data import timestamp_ns
from lclstreamer.sources.psana2_description import describe

pytestmark = pytest.mark.skipif(find_spec("psana") is None, reason="psana (LCLS-II) is not installed")

WAVELENGTH = "SIOC:SYS0:ML00:AO192"


def detector(name: str, fields: Any = None, **options: Any) -> models.Psana2DetectorInterface:
    return models.Psana2DetectorInterface(
        type="Psana2DetectorInterface", psana_name=name, psana_fields=fields, **options
    )


def read(
    identifier: str,
    data_sources: dict[str, Any] | None = None,
    rank: int = 0,
    size: int = 1,
    limit: int | None = None,
    **options: Any,
) -> list[Event]:
    source = Psana2EventSource(
        models.Psana2EventSource(type="Psana2EventSource", **options),
        SourceContext(identifier, data_sources or {}, rank, size, limit),
    )
    source.open()
    try:
        return list(source.events())
    finally:
        source.close()


def test_every_kind_of_data_source_reads_the_simulated_run(simulated_run: Path) -> None:
    events = read(
        f"files={simulated_run}",
        {
            "time": models.Psana2Timestamp(type="Psana2Timestamp"),
            "image": detector("jungfrau", "raw.raw", dtype="native"),
            "default": detector("jungfrau", "raw.raw"),
            "energy": detector("gmd", "raw.milliJoulesPerPulse"),
            "twice": detector("gmd", ["raw.milliJoulesPerPulse", "raw.milliJoulesPerPulse"], dtype="float32"),
            "wavelength": detector(WAVELENGTH),
            "identity": detector("jungfrau", "_detid", dtype="str"),
            "info": models.Psana2RunInfo(type="Psana2RunInfo"),
            "random": models.IntValue(type="IntValue", value=5),
        },
    )
    assert len(events) == 23
    assert [event.index for event in events] == list(range(23))
    first = events[0].values
    assert (first["image"].shape, first["image"].dtype) == ((1, 64, 96), np.uint16)
    assert first["default"].dtype == np.float64
    assert np.array_equal(first["default"], first["image"])
    assert first["twice"].tolist() == [np.float32(first["energy"])] * 2
    assert float(first["wavelength"]) == 1.31
    assert str(first["identity"]) == "simulated-0"
    assert [str(word) for word in first["info"]][::2] == ["mfxsim001", "7"]
    assert int(first["random"]) == 5
    assert (events[0].run.experiment, events[0].run.run) == ("mfxsim001", 7)


def test_times_increase_at_the_rate_of_the_machine_and_are_exact(simulated_run: Path) -> None:
    events = read(f"files={simulated_run}", {"time": models.Psana2Timestamp(type="Psana2Timestamp")})
    stamps = np.array([event.timestamp_ns for event in events])
    assert np.array_equal(np.diff(stamps), np.full(22, round(1e9 / 120)))
    packed = int(events[3].values["time"])
    assert abs(timestamp_ns(packed) - stamps[3]) < 1000
    assert events[3].values["time"].dtype == np.float64


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_together_read_every_event_of_a_file_once(simulated_run: Path, size: int) -> None:
    sources = {"energy": detector("gmd", "raw.milliJoulesPerPulse")}
    whole = read(f"files={simulated_run}", sources)
    parts = [read(f"files={simulated_run}", sources, rank, size) for rank in range(size)]
    together = sorted((event for part in parts for event in part), key=lambda event: event.index)
    assert [event.timestamp_ns for event in together] == [event.timestamp_ns for event in whole]
    assert [float(event.values["energy"]) for event in together] == [float(one.values["energy"]) for one in whole]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [(",max_events=9", None, 9), ("", 4, 4), (",max_events=9", 4, 4), (",max_events=0", None, 23)],
)
def test_max_events_and_num_events_count_over_all_ranks(
    simulated_run: Path, text: str, limit: int | None, expected: int
) -> None:
    indices = [event.index for rank in (0, 1) for event in read(f"files={simulated_run}{text}", {}, rank, 2, limit)]
    assert sorted(indices) == list(range(expected))


def test_several_files_are_read_one_after_the_other(simulated_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.xtc2"
    psana2_simulator.write(other, psana2_simulator.Simulation(events=4, rows=16, columns=16, run=8))
    parts = [read(f"files={simulated_run};{other}", {}, rank, 2) for rank in (0, 1)]
    together = sorted((event for part in parts for event in part), key=lambda event: event.index)
    assert [event.index for event in together] == list(range(27))
    assert [event.run.run for event in together] == [7] * 23 + [8] * 4


def test_a_missing_file_is_named() -> None:
    with pytest.raises(SourceError, match=r"source_identifier: file /nowhere/run\.xtc2 does not exist"):
        read("files=/nowhere/run.xtc2")


def test_a_detector_that_is_not_there_is_named_with_those_that_are(simulated_run: Path) -> None:
    with pytest.raises(SourceError) as caught:
        read(f"files={simulated_run}", {"image": detector("jungfrauu", "raw.raw")})
    text = str(caught.value)
    assert "data_sources.image.psana_name: 'jungfrauu' is not in run 7 of mfxsim001" in text
    assert "detectors: gmd, jungfrau" in text
    assert WAVELENGTH in text
    assert "did you mean jungfrau?" in text


def test_a_field_that_is_not_there_is_named_with_those_that_are(simulated_run: Path) -> None:
    with pytest.raises(SourceError, match=r"'raw.rau': jungfrau has no 'rau'; it has calib, .*raw; did you mean raw"):
        read(f"files={simulated_run}", {"image": detector("jungfrau", "raw.rau")})


def test_calibration_constants_from_a_file_are_used(simulated_run: Path, tmp_path: Path) -> None:
    shape = (3, 1, 64, 96)
    constants = {
        "pedestals": (np.full(shape, 2800.0, np.float32), {}),
        "pixel_gain": (np.full(shape, 40.0, np.float32), {}),
        "pixel_status": (np.zeros(shape, np.uint64), {}),
        "pixel_offset": (np.zeros(shape, np.float32), {}),
    }
    path = tmp_path / "constants.pkl"
    path.write_bytes(pickle.dumps({"calib_const": {"jungfrau": constants}, "det_info": {}}))
    sources = {"raw": detector("jungfrau", "raw.raw"), "calib": detector("jungfrau", "calibconst.pedestals")}
    source = Psana2EventSource(
        models.Psana2EventSource(type="Psana2EventSource", calibration=str(path)),
        SourceContext(f"files={simulated_run}", {"raw": sources["raw"]}),
    )
    source.open()
    assert np.array_equal(source.run.Detector("jungfrau").calibconst["pedestals"][0], constants["pedestals"][0])
    source.close()


@pytest.mark.parametrize("content", [None, b"no pickle", pickle.dumps([1])])
def test_a_bad_file_of_calibration_constants_is_named(
    simulated_run: Path, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "constants.pkl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError, match=r"event_source.calibration: .*constants\.pkl"):
        read(f"files={simulated_run}", {}, calibration=str(path))


def test_division_by_psana_of_a_file_is_refused(simulated_run: Path) -> None:
    with pytest.raises(SourceError, match=r"event_source\.division"):
        read(f"files={simulated_run}", {}, 0, 4, division="psana")


def test_the_stand_in_for_krtc_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match="lcls-krtc"):
        _psana._NoTicket("HTTP@host")


def test_the_description_lets_others_write_a_configuration(simulated_run: Path) -> None:
    found = describe(f"files={simulated_run}")
    assert (found["experiment"], found["run"], found["events"]) == ("mfxsim001", 7, 23)
    jungfrau = next(one for one in found["detectors"] if one["name"] == "jungfrau")
    assert (jungfrau["type"], jungfrau["algorithm"]) == ("jungfrau", "raw")
    assert {"name": "raw", "shape": [1, 64, 96], "dtype": "uint16"} in jungfrau["fields"]
    gmd = next(one for one in found["detectors"] if one["name"] == "gmd")
    assert {"name": "milliJoulesPerPulse", "shape": [], "dtype": "float64"} in gmd["fields"]
    assert found["epics"] == [WAVELENGTH]


def test_describing_what_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        describe("files=/nowhere.xtc2")
    with pytest.raises(ConfigurationError, match="not understood"):
        describe("nowhere.xtc2")


def test_the_same_seed_writes_the_same_run(tmp_path: Path) -> None:
    images = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = psana2_simulator.Simulation(events=3, rows=32, columns=32, seed=seed)
        psana2_simulator.write(tmp_path / name, options)
        events = read(f"files={tmp_path / name}", {"image": detector("jungfrau", "raw.raw", dtype="native")})
        images.append(np.stack([event.values["image"] for event in events]))
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_simulated_frames_look_like_diffraction_and_follow_the_pulse_energy(tmp_path: Path) -> None:
    path = tmp_path / "run.xtc2"
    psana2_simulator.write(path, psana2_simulator.Simulation(events=40, rows=128, columns=256, segments=2))
    events = read(
        f"files={path}",
        {"image": detector("jungfrau", "raw.raw"), "energy": detector("gmd", "raw.milliJoulesPerPulse")},
    )
    images = np.stack([event.values["image"] for event in events])
    energies = np.array([float(event.values["energy"]) for event in events])
    assert images.shape == (40, 2, 128, 256)
    assert energies.std() / energies.mean() > 0.1
    level = np.median(images.reshape(40, -1), axis=1)
    assert np.corrcoef(level, energies)[0, 1] > 0.6
    bright = (images > 2800 + 40 * 30).reshape(40, -1).sum(axis=1)
    assert 5 < np.count_nonzero(bright > 20) < 40
    assert images.max() <= 16383


def direct(path: Path, name: str, fields: str) -> tuple[list[Any], list[int]]:
    """What psana itself reads."""
    run = next(_psana.psana2().DataSource(files=[str(path)], skip_calib_load="all").runs())
    found = run.Detector(name)
    for word in fields.split("."):
        found = getattr(found, word)
    values, stamps = [], []
    for event in run.events():
        values.append(found(event))
        stamps.append(event.timestamp)
    return values, stamps


def test_the_real_jungfrau_run_equals_psanas_own_reading(real_run: Callable[[str], Path]) -> None:
    path = real_run("mfx101332224-r0007-jungfrau05M.xtc2")
    expected, stamps = direct(path, "jungfrau", "raw.raw")
    events = read(f"files={path}", {"image": detector("jungfrau", "raw.raw", dtype="native")})
    assert len(events) == len(expected) == 2
    assert [event.timestamp_ns for event in events] == [timestamp_ns(stamp) for stamp in stamps]
    for event, image in zip(events, expected, strict=True):
        assert event.values["image"].dtype == np.uint16
        assert np.array_equal(event.values["image"], image)


def test_the_real_time_tool_run_is_divided_without_loss(real_run: Callable[[str], Path]) -> None:
    path = real_run("timetool.xtc2")
    stamps = [event.timestamp_ns for rank in range(3) for event in read(f"files={path}", {}, rank, 3)]
    assert len(stamps) == len(set(stamps)) == 1325


def test_a_field_that_is_a_dictionary_is_explained(real_run: Callable[[str], Path]) -> None:
    path = real_run("tmolv9418-r0175-hsd.xtc2")
    with pytest.raises(ConfigurationError, match=r"data_sources.w: hsd raw.waveforms is a dictionary with the keys"):
        read(f"files={path}", {"w": detector("hsd", "raw.waveforms")})


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as an experiment's, with the small data of a run of two segments."""
    folder = tmp_path_factory.mktemp("experiment")
    options = psana2_simulator.Simulation(events=19, rows=32, columns=48, segments=2, experiment="mfxsim002", run=3)
    psana2_simulator.write_experiment(folder, options)
    return folder


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_run_of_an_experiment_is_read_without_a_logbook(experiment: Path, size: int) -> None:
    sources = {
        "image": detector("jungfrau", "raw.raw", dtype="native"),
        "energy": detector("gmd", "raw.milliJoulesPerPulse"),
        "wavelength": detector(WAVELENGTH),
    }
    whole = read(f"files={experiment}", sources)
    text = f"exp=mfxsim002,run=3,dir={experiment}"
    parts = sorted((one for rank in range(size) for one in read(text, sources, rank, size)), key=lambda one: one.index)
    assert [one.index for one in parts] == list(range(19))
    for got, expected in zip(parts, whole, strict=True):
        assert got.timestamp_ns == expected.timestamp_ns
        assert np.array_equal(got.values["image"], expected.values["image"])
        assert got.values["image"].shape == (2, 32, 48)
        assert float(got.values["energy"]) == float(expected.values["energy"])
        assert float(got.values["wavelength"]) == 1.31
    assert (parts[0].run.experiment, parts[0].run.run) == ("mfxsim002", 3)


def test_limits_hold_for_runs_of_an_experiment(experiment: Path) -> None:
    text = f"exp=mfxsim002,run=3,dir={experiment},max_events=8"
    found = [one.index for rank in (0, 1) for one in read(text, {}, rank, 2)]
    assert sorted(found) == list(range(8))
    assert len(read(text, {}, limit=5)) == 5


@pytest.mark.parametrize("text", ["exp=mfxsim002,run=4,dir={}", "exp=mfxsim002,run=3,dir={}/nowhere"])
def test_a_run_or_folder_that_is_not_there_is_named(experiment: Path, text: str) -> None:
    with pytest.raises(SourceError, match="source_identifier: "):
        read(text.format(experiment))
