"""LCLS-II runs as the data acquisition writes them: several files a run, segments of a detector in different ones."""

from __future__ import annotations

import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lclstreamer import models
from lclstreamer.config import from_mapping
from lclstreamer.engine import Engine
from lclstreamer.errors import SourceError
from lclstreamer.events import Event
from lclstreamer.sources import _psana, psana2_simulator
from lclstreamer.sources.base import SourceContext
from lclstreamer.sources.psana2 import Psana2EventSource
from lclstreamer.sources.psana2_data import timestamp_ns

pytestmark = pytest.mark.skipif(find_spec("psana") is None, reason="psana (LCLS-II) is not installed")

WAVELENGTH = "SIOC:SYS0:ML00:AO192"
EXPERIMENT, RUN, EVENTS = "mfxsim003", 5, 17
#: Shots of which the last file has nothing: no pulse energy, and a segment of the jungfrau is missing.
SKIPPED = frozenset({0, 4, 7, 16})


def detector(name: str, fields: Any = None) -> models.Psana2DetectorInterface:
    return models.Psana2DetectorInterface(
        type="Psana2DetectorInterface", psana_name=name, psana_fields=fields, dtype="native"
    )


def sources() -> dict[str, Any]:
    return {
        "image": detector("jungfrau", "raw.raw"),
        "energy": detector("gmd", "raw.milliJoulesPerPulse"),
        "wavelength": detector(WAVELENGTH),
    }


def read(identifier: str, data_sources: dict[str, Any], rank: int = 0, size: int = 1, **options: Any) -> list[Event]:
    source = Psana2EventSource(
        models.Psana2EventSource(type="Psana2EventSource", **options),
        SourceContext(identifier, data_sources, rank, size),
    )
    source.open()
    try:
        # psana uses the memory of calibrated images again for the next event.
        return [Event(copied(one.values), one.index, one.run, one.timestamp_ns) for one in source.events()]
    finally:
        source.close()


def copied(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value is None else np.array(value) for name, value in values.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three segments in two files, and their small data."""
    path = tmp_path_factory.mktemp("experiment")
    psana2_simulator.write_experiment(
        path,
        psana2_simulator.Simulation(
            events=EVENTS,
            rows=24,
            columns=40,
            segments=3,
            streams=2,
            experiment=EXPERIMENT,
            run=RUN,
            skipped=SKIPPED,
            variable_every=3,
        ),
    )
    assert len(list(path.glob("*.xtc2"))) == 2
    return path


@pytest.fixture
def psanas_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any, Any, Any]]:
    """Time, image, energy and wavelength of every event, as psana reads them from the same folder."""
    from psana.psexp.ds_base import DataSourceBase

    monkeypatch.setattr(DataSourceBase, "_get_file_info_from_db", lambda *_: {})  # there is no logbook
    data = _psana.psana2().DataSource(exp=EXPERIMENT, run=RUN, dir=str(folder), skip_calib_load="all")
    run = next(data.runs())
    image, energy, wavelength = run.Detector("jungfrau"), run.Detector("gmd"), run.Detector(WAVELENGTH)
    found = [
        (event.timestamp, image.raw.raw(event), energy.raw.milliJoulesPerPulse(event), wavelength(event))
        for event in run.events()
    ]
    assert len(found) == EVENTS
    assert sum(one[1] is None for one in found) == len(SKIPPED)
    return found


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("form", ["exp={exp},run={run},dir={folder}", "files={folder}", "files={folder}/*.xtc2"])
def test_a_run_of_several_files_is_read_completely_and_each_event_once(
    form: str, size: int, folder: Path, psanas_own: list[tuple[int, Any, Any, Any]]
) -> None:
    text = form.format(exp=EXPERIMENT, run=RUN, folder=folder)
    parts = [read(text, sources(), rank, size) for rank in range(size)]
    events = sorted((event for part in parts for event in part), key=lambda event: event.index)
    assert [event.index for event in events] == list(range(EVENTS))
    for event, (stamp, image, energy, wavelength) in zip(events, psanas_own, strict=True):
        assert event.timestamp_ns == timestamp_ns(stamp)
        # The variable's value at the time of the event, not the next one, whatever reads ahead.
        assert float(event.values["wavelength"]) == wavelength == pytest.approx(1.31 + 0.01 * (event.index // 3))
        if image is None:
            assert event.values["image"] is event.values["energy"] is energy is None
        else:
            assert event.values["image"].shape == (3, 24, 40)
            assert np.array_equal(event.values["image"], image)
            assert float(event.values["energy"]) == energy
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_segments_come_in_the_order_of_their_numbers_whatever_their_files(folder: Path, tmp_path: Path) -> None:
    options = psana2_simulator.Simulation(events=EVENTS, rows=24, columns=40, segments=3)
    psana2_simulator.write(tmp_path / "one.xtc2", options)
    whole = read(f"files={tmp_path / 'one.xtc2'}", {"image": detector("jungfrau", "raw.raw")})
    spread = read(f"files={folder}", {"image": detector("jungfrau", "raw.raw")})
    for number, (one, other) in enumerate(zip(whole, spread, strict=True)):
        if number not in SKIPPED:
            assert np.array_equal(one.values["image"], other.values["image"])


def test_a_limit_counts_events_and_not_parts_of_them(folder: Path) -> None:
    text = f"files={folder},max_events=5"
    found = [event.index for rank in range(2) for event in read(text, sources(), rank, 2)]
    assert sorted(found) == list(range(5))


def test_one_file_of_a_run_is_read_by_itself(folder: Path) -> None:
    path = folder / f"{EXPERIMENT}-r{RUN:04d}-s001-c000.xtc2"
    events = read(f"files={path}", {"energy": detector("gmd", "raw.milliJoulesPerPulse")})
    assert len(events) == EVENTS - len(SKIPPED)


@pytest.mark.parametrize(("lost", "has"), [("s*", "has none"), ("s001*", "has 000")])
def test_files_whose_events_cannot_be_put_together_are_refused_with_the_reason(
    folder: Path, tmp_path: Path, lost: str, has: str
) -> None:
    (tmp_path / "smalldata").mkdir()
    for path in folder.rglob("*.xtc2"):
        (tmp_path / path.relative_to(folder)).write_bytes(path.read_bytes())
    for path in tmp_path.glob(f"smalldata/*-{lost}.smd.xtc2"):
        path.unlink()
    with pytest.raises(SourceError, match=rf"names the streams 000, 001 of run 5, and .*smalldata {has}: small data"):
        read(f"files={tmp_path}", sources())


def test_streams_of_a_run_beside_another_run_are_refused_with_the_remedy(folder: Path, simulated_run: Path) -> None:
    with pytest.raises(SourceError, match=rf"name the run by exp={EXPERIMENT},run=5,dir={folder}"):
        read(f"files={folder};{simulated_run}", sources())


def test_missing_parts_are_marked_or_their_events_left_out_as_configured(folder: Path, tmp_path: Path) -> None:
    configuration: dict[str, Any] = {
        "source_identifier": f"files={folder}",
        "skip_incomplete_events": True,
        "event_source": {"type": "Psana2EventSource"},
        "data_sources": {name: section.model_dump() for name, section in sources().items()},
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 50},
        "data_serializer": {"type": "HDF5BinarySerializer", "fields": {name: f"/{name}" for name in sources()}},
        "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(tmp_path)}],
    }
    for skip, expected in ((True, EVENTS - len(SKIPPED)), (False, EVENTS)):
        engine = Engine(from_mapping({**configuration, "skip_incomplete_events": skip}, origin="test"))
        engine.open()
        counters = engine.run()
        assert counters.missing == {"image": len(SKIPPED), "energy": len(SKIPPED)}
        assert counters.events == expected


# ------------------------------------------------------------------------------------------------ calibration constants

SHAPE = (3, 2, 32, 48)
#: Counts a photon gives in high, medium and low gain; the last two count downwards.
GAINS = (41.0, -1.5, -0.1)


@pytest.fixture(scope="module")
def gains(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run whose pixels are in all three gain stages, and calibration constants for it."""
    folder = tmp_path_factory.mktemp("gains")
    random = np.random.default_rng(3)
    constants = {
        "pedestals": random.normal(2800, 100, SHAPE).astype(np.float32),
        "pixel_gain": np.stack([random.normal(gain, abs(gain) / 20, SHAPE[1:]).astype(np.float32) for gain in GAINS]),
        "pixel_offset": random.normal(0, 3, SHAPE).astype(np.float32),
        "pixel_rms": np.ones(SHAPE, np.float32),
        "pixel_status": np.zeros(SHAPE, np.uint64),
    }
    # A bad pixel in each segment.
    constants["pixel_status"][:, :, 5, 7] = 1
    psana2_simulator.write(
        folder / "run.xtc2",
        psana2_simulator.Simulation(events=6, rows=32, columns=48, segments=2, gain_switching=True),
    )
    pickled = {"jungfrau": {kind: (array, {}) for kind, array in constants.items()}}
    (folder / "constants.pkl").write_bytes(pickle.dumps({"calib_const": pickled, "det_info": {}}))
    return folder, constants


def test_calibrated_values_are_what_the_constants_say(gains: tuple[Path, dict[str, Any]]) -> None:
    folder, constants = gains
    events = read(
        f"files={folder / 'run.xtc2'}",
        {"raw": detector("jungfrau", "raw.raw"), "calib": detector("jungfrau", "raw.calib")},
        calibration=str(folder / "constants.pkl"),
    )
    assert len(events) == 6
    stages_seen: set[int] = set()
    for event in events:
        raw = event.values["raw"]
        # Bits 14 and 15 are 00, 01 and 11 in the three gain stages of a jungfrau.
        stage = np.where(raw >> 14 == 3, 2, raw >> 14)[np.newaxis]
        stages_seen |= set(np.unique(stage).tolist())
        taken = {kind: np.take_along_axis(array, stage, 0)[0] for kind, array in constants.items()}
        adu = (raw & 0x3FFF).astype(np.float64)
        expected = (adu - taken["pedestals"] - taken["pixel_offset"]) / taken["pixel_gain"]
        expected[taken["pixel_status"] != 0] = 0
        assert event.values["calib"].dtype == np.float32
        np.testing.assert_allclose(event.values["calib"], expected, rtol=1e-4, atol=5e-3)
    assert stages_seen == {0, 1, 2}


def test_calibrated_values_equal_psanas_own(gains: tuple[Path, dict[str, Any]]) -> None:
    folder, constants = gains
    events = read(
        f"files={folder / 'run.xtc2'}",
        {"calib": detector("jungfrau", "raw.calib")},
        calibration=str(folder / "constants.pkl"),
    )
    run = next(_psana.psana2().DataSource(files=[str(folder / "run.xtc2")], skip_calib_load="all").runs())
    about = {"experiment": "mfxsim001", "run": 7}
    run._calib_const = run.dsparms.calibconst = {"jungfrau": {kind: (one, about) for kind, one in constants.items()}}
    found = run.Detector("jungfrau")
    own = [np.array(found.raw.calib(event)) for event in run.events()]
    assert np.array_equal([event.values["calib"] for event in events], own)
