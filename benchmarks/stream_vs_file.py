r"""Is it quicker to stream a scan to its analysis than to write files, copy them, and read them there?

    python benchmarks/stream_vs_file.py --quick
    python benchmarks/stream_vs_file.py --scale 0.005 --folder /fast/disk --copy-to /other/disk --json figures.json

The scans are those of four-dimensional electron microscopy that others have measured: 128², 256², 512² and 1024² frames
of 576 x 576 16-bit pixels (10, 43, 173 and 695 GB); `--scale` says which part of the frames is taken. Both ways have
the same engine, frames, messages and analysis:

file     the engine writes its messages to files (each on the disk before the next), every file is copied and is on the
         disk again, then all are read and analysed. What was written is put out of the file cache, as it would be on
         another machine.
stream   the engine sends its messages to a buffer, from which the analysis pulls them.

Times are wall clock, with the start of all programs. The ways take turns; medians are printed. The analysis sums the
frames and counts pixels above a threshold; both ways must find the same, or there are no figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml
from numpy.typing import NDArray
from stopping import stop_on_signals

HERE = Path(__file__).resolve()
#: Frames of a scan: the square of its side.
SIDES = (128, 256, 512, 1024)
FRAME = (576, 576)
FRAME_BYTES = 2 * FRAME[0] * FRAME[1]
#: Frames that lie in memory and are given in turn, so that no detector is measured.
POOL = 64
BATCH = 12
THRESHOLD = 60
_BOUND_S = 900.0


# ---------------------------------------------------------------------------------------------------------- arithmetic


def frames_of(side: int, scale: float) -> int:
    """Frames of a scan of this side, scaled; at least one."""
    return max(1, round(side * side * scale))


def gigabytes(frames: int) -> float:
    """Size of so many frames in GB (10⁹ bytes)."""
    return frames * FRAME_BYTES / 1e9


def row_of(side: int, frames: int, file: Sequence[FileTimes], stream: Sequence[float]) -> dict[str, Any]:
    """One row of the table: medians of the rounds."""
    file_s, stream_s = statistics.median(one.total for one in file), statistics.median(stream)
    return {
        "scan": f"{side}x{side}",
        "frames": frames,
        "size_gb": gigabytes(frames),
        "file_s": file_s,
        "write_s": statistics.median(one.write for one in file),
        "copy_s": statistics.median(one.copy for one in file),
        "process_s": statistics.median(one.process for one in file),
        "stream_s": stream_s,
        "ratio": file_s / stream_s,
        "rounds": {"file_s": [one.total for one in file], "stream_s": list(stream)},
    }


@dataclass(frozen=True)
class FileTimes:
    """Seconds of the three steps with files."""

    write: float
    copy: float
    process: float

    @property
    def total(self) -> float:
        """One after the other: a file is copied when the scan has been written, as workflows with files do."""
        return self.write + self.copy + self.process


# ------------------------------------------------------------------------------------------------------------ analysis


@dataclass
class Analysis:
    """The sum of all frames, and how many pixels are above the threshold; the same whatever the order of the frames."""

    frames: int = 0
    above: int = 0
    total: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(FRAME, np.uint64))

    def add(self, images: NDArray[np.uint16]) -> None:
        """Take some frames."""
        self.frames += len(images)
        self.above += int(np.count_nonzero(images > THRESHOLD))
        self.total += images.sum(axis=0, dtype=np.uint32)

    def found(self) -> tuple[int, int, int]:
        """What must be equal for both ways."""
        weights = np.arange(1, self.total.size + 1, dtype=np.uint64).reshape(FRAME)
        return self.frames, self.above, int((self.total * weights).sum())


def pool() -> NDArray[np.uint16]:
    """Sparse frames of an electron detector: noise, and a few electrons."""
    random = np.random.default_rng(4)
    frames = random.normal(20, 6, (POOL, *FRAME)).clip(0) + 150 * (random.random((POOL, *FRAME)) < 0.002)
    whole: NDArray[np.uint16] = frames.astype(np.uint16)
    return whole


# -------------------------------------------------------------------------------------------------------------- engine


def child(config: str, frames: str) -> None:
    """The engine as its command starts it, with frames from memory."""
    from itertools import cycle

    from lclstreamer.cli import main
    from lclstreamer.sources.generic import GenericRandomNumpyArray

    given = cycle(list(np.load(frames)))
    GenericRandomNumpyArray.get = lambda self, event: next(given)  # type: ignore[method-assign]
    sys.argv[1:] = ["--config", config]
    main()


def configuration(frames: int, handler: dict[str, Any]) -> dict[str, Any]:
    """The engine's configuration; only the data handler differs between the two ways."""
    return {
        "source_identifier": "benchmark",
        "skip_incomplete_events": False,
        "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": frames},
        "data_sources": {
            "frames": {
                "type": "GenericRandomNumpyArray",
                "array_shape": f"{FRAME[0]},{FRAME[1]}",
                "array_dtype": "uint16",
            }
        },
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": BATCH},
        "data_serializer": {"type": "HDF5BinarySerializer", "fields": {"frames": "/data/frames"}},
        "data_handlers": [handler],
    }


@contextmanager
def program(words: Sequence[object], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has ended when the block has."""
    process = subprocess.Popen([str(word) for word in words], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def finished(process: subprocess.Popen[bytes], name: str, log: IO[bytes]) -> None:
    """Wait for a program that must end well."""
    code = process.wait(_BOUND_S)
    if code:
        log.seek(0)
        raise SystemExit(f"the {name} ended with {code}:\n{log.read().decode(errors='replace')[-3000:]}")


def engine(folder: Path, frames: int, handler: dict[str, Any]) -> list[object]:
    """The command of an engine with this data handler."""
    config = folder / "engine.yaml"
    config.write_text(yaml.safe_dump(configuration(frames, handler)))
    return [sys.executable, HERE, "--child", config, folder / "pool.npy"]


# ------------------------------------------------------------------------------------------------------- the two ways


def by_files(folder: Path, copies: Path, frames: int) -> tuple[FileTimes, Analysis]:
    """Write, copy, read and analyse."""
    from lclstream.client.batch import decode

    written = folder / "written"
    handler = {"type": "BinaryFileWritingDataHandler", "write_directory": str(written), "fsync": True}
    try:
        begin = time.monotonic()
        with (folder / "engine.log").open("w+b") as log, program(engine(folder, frames, handler), log) as process:
            finished(process, "engine", log)
        paths = sorted(written.glob("*.h5"), key=lambda path: int(path.stem.rpartition("_")[2]))
        wrote = time.monotonic()
        forget(paths)
        copies.mkdir(parents=True)
        begun_copy = time.monotonic()
        for path in paths:
            copy(path, copies / path.name)
        copied = time.monotonic()
        forget(copies / path.name for path in paths)
        analysis = Analysis()
        begun_reading = time.monotonic()
        for path in paths:
            batch = decode((copies / path.name).read_bytes(), name=path.name)
            analysis.add(batch["/data/frames"])
        times = FileTimes(wrote - begin, copied - begun_copy, time.monotonic() - begun_reading)
    finally:
        shutil.rmtree(written, ignore_errors=True)
        shutil.rmtree(copies, ignore_errors=True)
    return times, analysis


def copy(source: Path, target: Path) -> None:
    """A copy that is on the disk."""
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 8 << 20)
        write.flush()
        os.fsync(write.fileno())


def forget(paths: Iterable[Path]) -> None:
    """Put files out of the file cache: the reader is another machine."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def by_stream(folder: Path, frames: int) -> tuple[float, Analysis]:
    """Send, buffer, pull and analyse."""
    from lclstream.client import pull

    inp, out = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
    buffer: list[object] = [Path(sys.executable).parent / "nngstream", "--in", inp, "--out", out]
    buffer += ["--capacity", "256MiB", "--producers", "1", "--grace", "0.1", "--log-level", "warning"]
    handler = {"type": "BinaryDataStreamingDataHandler", "urls": [inp], "role": "client", "library": "nng"}
    analysis = Analysis()
    begin = time.monotonic()
    with (
        (folder / "buffer.log").open("w+b") as buffer_log,
        (folder / "engine.log").open("w+b") as engine_log,
        program(buffer, buffer_log) as held,
        program(engine(folder, frames, handler), engine_log) as sender,
    ):
        with pull(out, timeout_s=60, connect_timeout_s=60) as stream:
            for batch in stream.batches():
                analysis.add(batch["/data/frames"])
        finished(sender, "engine", engine_log)
        finished(held, "buffer", buffer_log)
    return time.monotonic() - begin, analysis


def free_ports(count: int) -> list[int]:
    """Loopback ports nobody listens at now, all different."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def measure(options: argparse.Namespace, folder: Path, copies: Path, side: int) -> dict[str, Any]:
    """One row: the ways in turn."""
    frames = frames_of(side, options.scale)
    file: list[FileTimes] = []
    stream: list[float] = []
    for _ in range(options.rounds):
        times, by_file = by_files(folder, copies, frames)
        seconds, streamed = by_stream(folder, frames)
        if not by_file.found() == streamed.found() or streamed.frames != frames:
            raise SystemExit(
                f"scan {side}x{side}: the analysis of files found {by_file.found()}, that of the stream "
                f"{streamed.found()}, of {frames} frames: one of them is wrong"
            )
        file.append(times)
        stream.append(seconds)
    return row_of(side, frames, file, stream)


# ---------------------------------------------------------------------------------------------------------------- main


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with what `--quick` stands for filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, help="part of the frames that is taken [0.002; quick: 0.0005]")
    parser.add_argument("--sides", help="sides of the scans, separated by commas [128,256,512,1024]")
    parser.add_argument("--rounds", type=int, help="measurements of each way [3; quick: 1]")
    parser.add_argument("--folder", type=Path, help="where files are written [a temporary folder]")
    parser.add_argument("--copy-to", type=Path, help="where they are copied to [beside them]")
    parser.add_argument("--quick", action="store_true", help="small and once: under 50 s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same for programs")
    options = parser.parse_args(words)
    options.scale = options.scale or (0.0005 if options.quick else 0.002)
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.sides = [int(side) for side in options.sides.split(",")] if options.sides else list(SIDES)
    if not 0 < options.scale <= 1 or options.rounds < 1 or min(options.sides) < 1:
        parser.error("--scale is above 0 and at most 1, --rounds and --sides are whole numbers from 1 on")
    return options


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def main() -> None:
    """Read options, measure, print."""
    options = arguments()
    about, rows = machine(), []
    print(f"{about['cores']} cores, load {about['load_before']:.1f}, scale {options.scale:g}", flush=True)
    print("     scan      GB    file s  (write   copy  process)  stream s  ratio", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="stream-vs-file-") as name:
        folder = Path(name)
        np.save(folder / "pool.npy", pool())
        copies = (options.copy_to or folder) / f"copies-{os.getpid()}"
        for side in options.sides:
            row = measure(options, folder, copies, side)
            rows.append(row)
            print(
                f"{row['scan']:>9} {row['size_gb']:7.2f} {row['file_s']:9.2f}  ({row['write_s']:5.2f} "
                f"{row['copy_s']:6.2f} {row['process_s']:8.2f})  {row['stream_s']:8.2f} {row['ratio']:6.2f}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "scale": options.scale, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
    else:
        stop_on_signals()
        main()
