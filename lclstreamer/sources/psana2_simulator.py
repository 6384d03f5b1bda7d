"""Write an LCLS-II run as psana does: ``python -m lclstreamer.sources.psana2_simulator --out run.xtc2 --events 200``.

The run has a jungfrau (`raw.raw`: (segments, rows, columns) uint16), the pulse energy (`gmd`,
`raw.milliJoulesPerPulse`) and an EPICS variable (the photon wavelength). A frame looks like serial crystallography: a
smooth background that falls off from the beam with a water ring, Bragg-like peaks on resolution rings in some of the
shots, Poisson noise. The intensity goes, loosely, with the pulse energy. The same seed gives the same run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray

from lclstreamer.errors import ConfigurationError
from lclstreamer.sources import _psana

WAVELENGTH_VARIABLE = "SIOC:SYS0:ML00:AO192"
#: Seconds since 1990-01-01 of the first event: 2025-03-29T10:00:00Z.
_FIRST_S = 1_112_090_400
#: Dark level of the detector in ADU, and ADU of a photon.
_PEDESTAL, _GAIN = 2800.0, 40.0
#: The two highest bits of a jungfrau's pixel in its three gain stages.
_GAIN_BITS = np.array([0 << 14, 1 << 14, 3 << 14], np.uint16)


@dataclass(frozen=True)
class Simulation:
    """What a simulated run is like.

    Attributes:
        events: number of shots.
        experiment: name of the experiment.
        run: run number.
        segments, rows, columns: shape of a frame.
        rate_hz: shots per second, as the timestamps say.
        hit_fraction: part of the shots that have peaks.
        seed: of all random numbers.
        streams: files the run is written to, as by so many readout nodes; the segments are dealt out to them in turn,
            and the other detectors are in the last. More than one only with :func:`write_experiment`.
        skipped: shots whose part the last stream does not have, as when a readout node loses events.
        variable_every: shots after which the EPICS variable changes, by 0.01 each time; 0: never.
        gain_switching: pixels are in all three gain stages of a jungfrau, as bits 14 and 15 say; without it all are in
            the highest.
    """

    events: int = 200
    experiment: str = "mfxsim001"
    run: int = 7
    segments: int = 1
    rows: int = 512
    columns: int = 1024
    rate_hz: float = 120.0
    hit_fraction: float = 0.6
    seed: int = 1
    streams: int = 1
    skipped: frozenset[int] = frozenset()
    gain_switching: bool = False
    variable_every: int = 0


class _Frames:
    """Makes the frames of a simulated run, one after the other."""

    def __init__(self, options: Simulation) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)
        shape = (options.segments, options.rows, options.columns)
        row = np.arange(options.segments * options.rows, dtype=np.float32).reshape(options.segments, options.rows, 1)
        column = np.arange(options.columns, dtype=np.float32)
        # The beam passes below the lower edge, as it does beside a half-megapixel jungfrau.
        self._beam = (1.12 * options.segments * options.rows, 0.5 * options.columns)
        radius = np.hypot(row - self._beam[0], column - self._beam[1])
        scale = float(radius.max())
        falling = 6.0 * np.exp(-radius / (0.35 * scale)) + 0.4
        water = 2.5 * np.exp(-(((radius - 0.55 * scale) / (0.07 * scale)) ** 2))
        self._background = (falling + water).astype(np.float32)
        self._scale = scale
        self._pedestal = (_PEDESTAL + self._random.normal(0.0, 12.0, shape)).astype(np.float32)
        self._rings = np.array([0.28, 0.36, 0.44, 0.53, 0.61, 0.7, 0.79, 0.88]) * scale

    def __iter__(self) -> Iterator[tuple[NDArray[np.uint16], float]]:
        """Frames with the pulse energy in mJ of their shots."""
        random = self._random
        for _ in range(self._options.events):
            energy = float(np.clip(random.gamma(18.0, 2.0 / 18.0), 0.05, None))
            intensity = energy / 2.0 * random.lognormal(0.0, 0.15)
            photons = self._background * intensity
            if random.random() < self._options.hit_fraction:
                photons = photons.copy()
                self._add_peaks(photons, intensity)
            counts = random.poisson(photons).astype(np.float32)
            frame = self._pedestal + _GAIN * counts + 4.0 * random.standard_normal(counts.shape, dtype=np.float32)
            image = np.clip(frame, 0, 16383).astype(np.uint16)
            if self._options.gain_switching:
                image |= random.choice(_GAIN_BITS, size=image.shape)
            yield image, energy

    def _add_peaks(self, photons: NDArray[np.float32], intensity: float) -> None:
        random = self._random
        segments, rows, columns = photons.shape
        image = photons.reshape(segments * rows, columns)
        for _ in range(int(random.integers(25, 90))):
            ring = float(random.choice(self._rings)) + float(random.normal(0.0, 1.0))
            angle = float(random.uniform(-np.pi, 0.0))
            y, x = self._beam[0] + ring * np.sin(angle), self._beam[1] + ring * np.cos(angle)
            top, left = int(y) - 3, int(x) - 3
            if not (0 <= top < image.shape[0] - 7 and 0 <= left < columns - 7):
                continue
            width = float(random.uniform(0.8, 1.4))
            strength = float(random.exponential(120.0)) * intensity * np.exp(-ring / self._scale)
            offsets = np.arange(7)
            profile = np.exp(-((offsets[:, None] + top - y) ** 2 + (offsets + left - x) ** 2) / (2 * width**2))
            image[top : top + 7, left : left + 7] += (strength * profile).astype(np.float32)


def write(path: Path | str, options: Simulation | None = None) -> None:
    """Write a simulated run as an xtc2 file.

    Raises:
        ConfigurationError: psana is not installed, or the file cannot be written.
    """
    _psana.psana2()
    try:
        with Path(path).open("wb") as file:
            _Writer([_Files(file, None)], options or Simulation()).write()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error


def write_experiment(folder: Path | str, options: Simulation | None = None) -> Path:
    """Write a simulated run as the data acquisition does: a file a stream, and its small data for finding events.

    The run is opened with ``exp=…,run=…,dir=FOLDER``.

    Returns:
        The first stream's file.

    Raises:
        ConfigurationError: psana is not installed, or the files cannot be written.
    """
    options = options or Simulation()
    _psana.psana2()
    names = [f"{options.experiment}-r{options.run:04d}-s{stream:03d}-c000" for stream in range(options.streams)]
    big, small = Path(folder), Path(folder) / "smalldata"
    try:
        small.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            files = [
                _Files(
                    stack.enter_context((big / f"{name}.xtc2").open("wb")),
                    stack.enter_context((small / f"{name}.smd.xtc2").open("wb")),
                )
                for name in names
            ]
            _Writer(files, options).write()
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written: {error.strerror}") from error
    return big / f"{names[0]}.xtc2"


class _Files(NamedTuple):
    """What one readout node writes: its data, and where in them its events are."""

    big: BinaryIO
    small: BinaryIO | None


class _Writer:
    """Writes the datagrams of a run, and those of its small data where there are files for them."""

    def __init__(self, files: Sequence[_Files], options: Simulation) -> None:
        from psana.dgramedit import DgramEdit
        from psana.psexp.transitionid import TransitionId

        self._options = options
        self._edit = DgramEdit
        self._ids = TransitionId
        self._room = 2 * options.segments * options.rows * options.columns + (1 << 20)
        self._buffer = bytearray(self._room)
        self._nanoseconds = 0
        self._wavelength = 1.31
        self._nodes: list[tuple[_Stream, _Stream | None]] = []
        for number, (big, small) in enumerate(files):
            segments = range(number, options.segments, len(files))
            others = number == len(files) - 1
            index: _Stream | None = None
            stream = _Stream(self._configure(), big, segments, others=others)
            if small is not None:
                # Small data has the same detectors under the same numbers, and after them its own.
                index = _Stream(self._configure(), small, segments, others=others)
                index.add_index()
            self._nodes.append((stream, index))
            for one in (stream, index):
                if one is not None:
                    self._save(one, one.config)

    def _configure(self) -> Any:
        return self._edit(transition_id=self._ids.Configure, ts=_FIRST_S << 32, bufsize=self._room)

    def write(self) -> None:
        """The whole run, transitions included."""
        ids = self._ids
        self._transition(ids.BeginRun, self._add_run)
        self._transition(ids.BeginStep)
        self._transition(ids.Enable)
        self._transition(ids.SlowUpdate, self._add_variables)
        step = round(1e9 / self._options.rate_hz)
        every = self._options.variable_every
        for shot, (frame, energy) in enumerate(_Frames(self._options)):
            if every and shot and shot % every == 0:
                self._wavelength += 0.01
                self._transition(ids.SlowUpdate, self._add_variables)
            self._nanoseconds += step
            nodes = self._nodes[:-1] if shot in self._options.skipped else self._nodes
            self._datagram(ids.L1Accept, partial(self._add_shot, frame=frame, energy=energy), nodes)
        for transition in (ids.Disable, ids.EndStep, ids.EndRun):
            self._transition(transition)

    def _transition(self, which: int, fill: Callable[[_Stream, Any], None] | None = None) -> None:
        self._nanoseconds += 1000
        self._datagram(which, fill)

    def _datagram(
        self,
        which: int,
        fill: Callable[[_Stream, Any], None] | None,
        nodes: Sequence[tuple[_Stream, _Stream | None]] | None = None,
    ) -> None:
        seconds, nanoseconds = divmod(self._nanoseconds, 1_000_000_000)
        stamp = ((_FIRST_S + seconds) << 32) | nanoseconds
        for big, small in self._nodes if nodes is None else nodes:
            place, length = big.file.tell(), 0
            for stream in (big, small):
                if stream is None:
                    continue
                datagram = self._edit(transition_id=which, config_dgramedit=stream.config, ts=stamp, bufsize=self._room)
                if stream is small and which == self._ids.L1Accept:
                    stream.point_to(datagram, place, length)
                elif fill is not None:
                    fill(stream, datagram)
                length = self._save(stream, datagram)

    def _save(self, stream: _Stream, datagram: Any) -> int:
        datagram.save(self._buffer)
        stream.file.write(memoryview(self._buffer)[: datagram.size])
        return int(datagram.size)

    def _add_run(self, stream: _Stream, datagram: Any) -> None:
        stream.runinfo.runinfo.expt = self._options.experiment
        stream.runinfo.runinfo.runnum = self._options.run
        datagram.adddata(stream.runinfo.runinfo)

    def _add_variables(self, stream: _Stream, datagram: Any) -> None:
        if stream.epics is None:
            return
        setattr(stream.epics.raw, WAVELENGTH_VARIABLE, self._wavelength)
        datagram.adddata(stream.epics.raw)

    def _add_shot(self, stream: _Stream, datagram: Any, frame: NDArray[np.uint16], energy: float) -> None:
        for segment, detector in stream.jungfrau.items():
            detector.raw.raw = np.ascontiguousarray(frame[segment : segment + 1])
            datagram.adddata(detector.raw)
        if stream.gmd is None:
            return
        stream.gmd.raw.milliJoulesPerPulse = energy
        datagram.adddata(stream.gmd.raw)


class _Stream:
    """A file of datagrams, and the detectors its Configure names."""

    def __init__(self, config: Any, file: BinaryIO, segments: Iterable[int], *, others: bool) -> None:
        from psana.dgramedit import AlgDef, DetectorDef

        self.config, self.file = config, file
        self._algorithm, self._detector = AlgDef, DetectorDef
        self.jungfrau = {
            segment: config.Detector(
                DetectorDef("jungfrau", "jungfrau", f"simulated-{segment}"),
                AlgDef("raw", 0, 2, 0),
                {"raw": (np.uint16, 3)},
                segment=segment,
            )
            for segment in segments
        }
        self.gmd = self.epics = None
        if others:
            self.gmd = self._add("gmd", AlgDef("raw", 2, 1, 0), {"milliJoulesPerPulse": (np.float64, 0)})
        self.runinfo = self._add("runinfo", AlgDef("runinfo", 0, 0, 1), {"expt": (str, 1), "runnum": (np.uint32, 0)})
        if others:
            self.epics = self._add("epics", AlgDef("raw", 2, 0, 0), {WAVELENGTH_VARIABLE: (np.float64, 0)})
        self.index: Any = None

    def add_index(self) -> None:
        """Name what small data has of an event: where it is in the stream's file."""
        fields = {"intOffset": (np.uint64, 0), "intDgramSize": (np.uint64, 0)}
        self.index = self._add("smdinfo", self._algorithm("offsetAlg", 0, 0, 0), fields)

    def point_to(self, datagram: Any, place: int, length: int) -> None:
        """Add the place of an event to its small datagram."""
        self.index.offsetAlg.intOffset, self.index.offsetAlg.intDgramSize = place, length
        datagram.adddata(self.index.offsetAlg)

    def _add(self, name: str, algorithm: Any, fields: dict[str, Any]) -> Any:
        return self.config.Detector(self._detector(name, name, "simulated"), algorithm, fields)


app = typer.Typer(add_completion=False)


@app.command()
def command(
    out: Annotated[Path | None, typer.Option(help="The xtc2 file to write, read with files=FILE.")] = None,
    experiment_dir: Annotated[
        Path | None, typer.Option("--dir", help="Or the folder to write to, read with exp=,run=,dir=FOLDER.")
    ] = None,
    events: Annotated[int, typer.Option(min=1, help="Number of shots.")] = Simulation.events,
    experiment: Annotated[str, typer.Option(help="Name of the experiment.")] = Simulation.experiment,
    run: Annotated[int, typer.Option(min=0, help="Run number.")] = Simulation.run,
    segments: Annotated[int, typer.Option(min=1, help="Segments of the jungfrau.")] = Simulation.segments,
    rows: Annotated[int, typer.Option(min=16, help="Rows of a segment.")] = Simulation.rows,
    columns: Annotated[int, typer.Option(min=16, help="Columns of a segment.")] = Simulation.columns,
    rate: Annotated[float, typer.Option(min=0.001, help="Shots a second, as the timestamps say.")] = Simulation.rate_hz,
    hit_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Part of the shots with peaks.")
    ] = Simulation.hit_fraction,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = Simulation.seed,
    streams: Annotated[
        int, typer.Option(min=1, help="With --dir: files the run is spread over, as by so many readout nodes.")
    ] = Simulation.streams,
) -> None:
    """Write a simulated LCLS-II run (jungfrau, pulse energy, an EPICS variable) as an xtc2 file.

    Example: python -m lclstreamer.sources.psana2_simulator --out run.xtc2 --events 200

    Exit codes: 0 written; 2 wrong options, psana is missing or the file cannot be written.
    """
    options = Simulation(events, experiment, run, segments, rows, columns, rate, hit_fraction, seed, streams)
    if streams > 1 and experiment_dir is None:
        typer.echo("error: --streams needs --dir: events of several files are put together by small data", err=True)
        raise SystemExit(2)
    if (out is None) == (experiment_dir is None):
        typer.echo("error: either --out or --dir is needed", err=True)
        raise SystemExit(2)
    try:
        if experiment_dir is not None:
            out = write_experiment(experiment_dir, options)
        elif out is not None:
            write(out, options)
    except ConfigurationError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
    typer.echo(f"{out}: {events} events of run {run} of {experiment}")


if __name__ == "__main__":
    app()
