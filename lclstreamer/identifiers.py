"""What a `source_identifier` says, per event source, checked without reading anything."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

#: How the data acquisition names the files of a run: a stream for each readout node, in chunks.
_STREAM = re.compile(r"(?P<exp>.+)-r(?P<run>\d+)-s(?P<stream>\d+)-c\d+\.xtc2")
PSANA2_KEYS = ("exp", "run", "dir", "files", "shmem", "drp", "max_events")


@dataclass(frozen=True)
class Psana2Identifier:
    """The parts of a psana2 `source_identifier`."""

    exp: str | None = None
    run: int | None = None
    dir: str | None = None
    files: str | None = None
    shmem: str | None = None
    drp: str | None = None
    max_events: int | None = None

    def paths(self) -> list[Path]:
        """The files that `files=` names, see :func:`find_files`."""
        return find_files(self.files or "", (".xtc2",))

    def whole_run(self) -> Psana2Identifier:
        """The same data as ``exp=,run=,dir=`` if `files=` names several streams of a run, which belong together.

        Raises:
            FileNotFoundError: as :func:`find_files`.
            ValueError: streams whose events cannot be put together: without small data, of several runs, or not all of
                the run's.
        """
        paths = self.paths()
        named = [(path, match) for path in paths if (match := _STREAM.fullmatch(path.name))]
        streams: dict[tuple[Path, str, str], set[str]] = {}
        for path, match in named:
            streams.setdefault((path.parent, match["exp"], match["run"]), set()).add(match["stream"])
        if all(len(numbers) == 1 for numbers in streams.values()):
            return self
        folder, experiment, run = next(run for run, numbers in streams.items() if len(numbers) > 1)
        advice = f"name the run by exp={experiment},run={int(run)},dir={folder}"
        if len(streams) > 1 or len(named) < len(paths):
            raise ValueError(f"files={self.files} names several streams of run {int(run)}, and other files: {advice}")
        index = (folder / "smalldata").glob(f"{experiment}-r{run}-s*.smd.xtc2")
        indexed = {match["stream"] for path in index if (match := _STREAM.fullmatch(path.name.replace(".smd", "")))}
        given = streams[folder, experiment, run]
        if indexed != given:
            raise ValueError(
                f"files={self.files} names the streams {', '.join(sorted(given))} of run {int(run)}, and "
                f"{folder / 'smalldata'} has {', '.join(sorted(indexed)) or 'none'}: small data of exactly these are "
                "needed to put their events together. Name one stream, or all with their small data"
            )
        return Psana2Identifier(exp=experiment, run=int(run), dir=str(folder), max_events=self.max_events)


def find_files(text: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that a text names: a file, a folder, a pattern, or several of these joined by ``;``.

    Args:
        text: what follows ``files=``.
        suffixes: which files of a folder are meant.

    Raises:
        FileNotFoundError: a named file is not there, a folder or pattern has no such file.
    """
    found: list[Path] = []
    for word in text.split(";"):
        if not word.strip():
            continue
        path = Path(word.strip()).expanduser()
        if path.is_dir():
            here = sorted(one for one in path.iterdir() if one.suffix in suffixes)
            if not here:
                raise FileNotFoundError(f"folder {path} has no file {' or '.join('*' + one for one in suffixes)}")
            found += here
        elif glob.has_magic(str(path)):
            here = sorted(Path(name) for name in glob.glob(str(path)))
            if not here:
                raise FileNotFoundError(f"no file matches {path}")
            found += here
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"file {path} does not exist")
    return found


def parse_files(text: str) -> str:
    """What follows ``files=``.

    Raises:
        ValueError: something else is named.
    """
    key, _, value = text.partition("=")
    if key.strip() != "files" or not value.strip():
        raise ValueError(
            f"{text!r} is not understood; archived files are named by files=PATH, e.g. files=/data/run7/*.h5"
        )
    return value.strip()


def parse_psana2(text: str) -> Psana2Identifier:
    """Parse ``exp=E,run=N`` and the like.

    Raises:
        ValueError: an unknown key, a value that is no number where one is needed, or no source at all.
    """
    values: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in PSANA2_KEYS or not equals or not value:
            raise ValueError(
                f"{item.strip()!r} is not understood; a psana2 source is KEY=VALUE joined by commas with the keys "
                f"{', '.join(PSANA2_KEYS)}, e.g. exp=mfx101332224,run=7 or files=run7.xtc2"
            )
        values[key] = value
    numbers: dict[str, int] = {}
    for key in ("run", "max_events"):
        if key in values:
            if not values[key].isdigit():
                raise ValueError(f"{key}={values[key]}: a whole number is needed")
            numbers[key] = int(values[key])
    sources = [key for key in ("exp", "files", "shmem", "drp") if key in values]
    if len(sources) != 1:
        raise ValueError(f"{text!r} must name its data by exactly one of exp=, files=, shmem=, drp=")
    for key in ("run", "dir"):
        if key in values and "exp" not in values:
            raise ValueError(f"{key}= belongs to exp=, not to {sources[0]}=")
    return Psana2Identifier(
        exp=values.get("exp"),
        run=numbers.get("run"),
        dir=values.get("dir"),
        files=values.get("files"),
        shmem=values.get("shmem"),
        drp=values.get("drp"),
        # As in psana, 0 is no limit.
        max_events=numbers.get("max_events") or None,
    )


def parse_psana1(text: str) -> str:
    """Check a psana1 identifier and return it as psana1 wants it.

    Raises:
        ValueError: neither ``exp=E:run=N`` nor a ``shmem=`` source.
    """
    if "shmem" in text:
        return text
    parts = dict(part.partition("=")[::2] for part in text.split(":"))
    if not parts.get("exp") or not parts.get("run"):
        raise ValueError(f"{text!r} is not a psana1 source; one is e.g. exp=xpptut15:run=430")
    return text if text.endswith(":smd") else f"{text}:smd"
