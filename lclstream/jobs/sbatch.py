"""Options of sbatch, as people write them on a command line or in ``#SBATCH`` lines, made into parts of a job.

What has a place in a job specification goes there (nodes, processes, cores, time); a job's name, folder and logs are
kept apart, since who runs the job decides about them; the rest become `attributes`, under their long names, for the
backend's allow-list to judge.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

#: Long names of the one-letter options.
_SHORT = {
    "A": "account", "C": "constraint", "D": "chdir", "G": "gpus", "J": "job-name", "L": "licenses", "M": "clusters",
    "N": "nodes", "a": "array", "b": "begin", "c": "cpus-per-task", "d": "dependency", "e": "error", "i": "input",
    "n": "ntasks", "o": "output", "p": "partition", "q": "qos", "t": "time", "w": "nodelist", "x": "exclude",
}  # fmt: skip
#: Options that stand without a value, or take one only after a "=".
_ALONE = {
    "contiguous", "exclusive", "hold", "ignore-pbs", "kill-on-invalid-dep", "no-kill", "no-requeue", "overcommit",
    "oversubscribe", "quiet", "requeue", "spread-job", "use-min-nodes", "verbose", "wait",
}  # fmt: skip
_SHORT_ALONE = {"H": "hold", "O": "overcommit", "Q": "quiet", "s": "oversubscribe", "v": "verbose", "W": "wait"}
_COUNTS = {
    "nodes": "node_count",
    "ntasks": "process_count",
    "ntasks-per-node": "processes_per_node",
    "cpus-per-task": "cpu_cores_per_process",
    "gpus-per-task": "gpu_cores_per_process",
}
_APART = {"job-name": "name", "chdir": "directory", "output": "output", "error": "error"}


class SbatchOptionError(ValueError):
    """An option cannot be understood; the message names it."""


@dataclass
class SbatchOptions:
    """What options ask for.

    Attributes:
        resources: fields of a job specification's `resources`; `duration` in minutes. Jobs share their nodes unless
            ``--exclusive`` is there, as with sbatch.
        attributes: the other options: long name with its dashes → value, empty for an option without one.
        name: ``--job-name``.
        directory: ``--chdir``.
        output: ``--output``, with its places such as ``%j``.
        error: ``--error``.
    """

    resources: dict[str, Any] = field(default_factory=lambda: {"exclusive_node_use": False})
    attributes: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    directory: str | None = None
    output: str | None = None
    error: str | None = None


def parse_options(words: Iterable[str]) -> SbatchOptions:
    """Understand options; of one that is there twice the last counts.

    Args:
        words: such as ``["--partition=milano", "-N", "2", "--time", "1:00:00"]``.

    Raises:
        SbatchOptionError: a word is no option, or an option has no or a wrong value.
    """
    options = SbatchOptions()
    for name, value in _pairs(words):
        if name in _APART:
            setattr(options, _APART[name], value)
        elif name == "time":
            options.resources["duration"] = minutes(value)
        elif name == "exclusive" and not value:
            options.resources["exclusive_node_use"] = True
        elif name in _COUNTS and value.isdigit() and int(value) > 0:
            options.resources[_COUNTS[name]] = int(value)
            options.attributes.pop(f"--{name}", None)
        elif name in _COUNTS and not (name == "nodes" and re.fullmatch(r"\d+-\d+", value)):
            raise SbatchOptionError(f"--{name}={value}: a whole number above 0 is needed")
        else:
            options.attributes[f"--{name}"] = value
    return options


def _pairs(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    rest = iter(words)
    for word in rest:
        if match := re.fullmatch(r"--([a-z][a-z0-9-]*)(?:=(.*))?", word, re.DOTALL):
            name, value = match.group(1), match.group(2)
            alone = name in _ALONE
        elif match := re.fullmatch(r"-([A-Za-z])(.*)", word, re.DOTALL):
            letter, value = match.group(1), match.group(2).removeprefix("=") or None
            alone = letter in _SHORT_ALONE
            if letter not in _SHORT and not alone:
                raise SbatchOptionError(f"{word}: no option of sbatch that is known here; write its long name")
            name = _SHORT_ALONE[letter] if alone else _SHORT[letter]
        else:
            raise SbatchOptionError(f"{word!r}: an option of sbatch is needed, such as --partition=NAME")
        if value is None and not alone:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise SbatchOptionError(f"{word}: its value is missing")
        yield name, value or ""


def directives(script: str) -> list[str]:
    """The words of a script's ``#SBATCH`` lines; sbatch reads them up to the first command.

    Raises:
        SbatchOptionError: a quotation mark is not closed.
    """
    words: list[str] = []
    for line in script.splitlines():
        if line.startswith("#SBATCH"):
            try:
                words += shlex.split(line.removeprefix("#SBATCH"), comments=True)
            except ValueError as error:
                raise SbatchOptionError(f"{line}: {error}") from error
        elif line.strip() and not line.startswith("#"):
            break
    return words


def minutes(text: str) -> float:
    """A time limit of Slurm in minutes: ``MIN``, ``MIN:SEC``, ``H:MIN:SEC``, ``DAYS-H[:MIN[:SEC]]``.

    Raises:
        SbatchOptionError: it is none of these, or is 0.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip(), re.ASCII)
    if match is None:
        raise SbatchOptionError(f"time {text!r}: minutes, M:S, H:M:S, or DAYS-H[:M[:S]] are needed")
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, mins, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, mins, seconds = numbers
    else:
        hours, (mins, seconds) = 0, (*numbers, 0)[:2]
    total = int(days or 0) * 1440 + hours * 60 + mins + seconds / 60
    if total <= 0:
        raise SbatchOptionError(f"time {text!r}: a job needs more than no time")
    return total
