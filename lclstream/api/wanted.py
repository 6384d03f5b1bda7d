"""Which data a request wants, by its source identifier, and whether its sender may have them.

The engine reads with an account of its own, which may read more than whoever asks. Where a roles file says whose an
experiment is, its data are for its members, and files are for those who look after the site: what a path leads to,
nobody can tell here. Nothing is read to decide this, because the files are on the engine's machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lclstream.security.identity import Identity
from lclstream.security.roles import Action, Roles, Ruling
from lclstreamer import identifiers
from lclstreamer.config import Parameters


@dataclass(frozen=True)
class Wanted:
    """What a source identifier names.

    Attributes:
        experiments: experiments, as they are written there, without the instrument.
        paths: files, folders and patterns.
        live: the shared memory or acquisition it reads from, if it does: nobody knows here whose data come.
    """

    experiments: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    live: str | None = None

    @property
    def experiment(self) -> str | None:
        """The experiment whose data they are, if it is one."""
        return self.experiments[0] if len(set(self.experiments)) == 1 else None


def wanted(parameters: Parameters) -> Wanted:
    """What a configuration that was checked wants."""
    kind, text = parameters.event_source.type, parameters.source_identifier
    if kind == "Psana2EventSource":
        source = identifiers.parse_psana2(text)
        live = next((f"{key}=" for key in ("shmem", "drp") if getattr(source, key) is not None), None)
        return Wanted(_names([source.exp or ""]), _words([source.dir or "", *(source.files or "").split(";")]), live)
    if kind == "HDF5EventSource":
        return Wanted(paths=_words(identifiers.parse_files(text).split(";")))
    # psana1 and sources of other packages have more words than we know: whatever may be a path is taken for one.
    experiments, paths, live = [], [], "shmem=" if "shmem" in text else None
    for word in re.split("[,:;]", text):
        key, equals, value = (part.strip() for part in word.partition("="))
        if key == "exp":
            experiments.append(value)
        elif "/" in word or key in ("dir", "files"):
            paths.append(value if equals else key)
    if kind == "InternalEventSource":
        return Wanted(_names(experiments))  # it makes numbers, and reads nothing
    return Wanted(_names(experiments), _words(paths), live)


def _names(texts: Iterable[str]) -> tuple[str, ...]:
    """Experiments without the instrument psana1 may be given as well, as in ``amo/amo86615``."""
    return tuple(text.rpartition("/")[2] for text in _words(texts))


def _words(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(text.strip() for text in texts if text.strip())


def ruling(caller: Identity, what: Wanted, roles: Roles, folders: Iterable[Path]) -> Ruling:
    """Whether somebody may ask for that.

    Args:
        caller: who asks.
        what: the data.
        roles: experiments with their members; where none is listed, everybody may ask for everything.
        folders: below these, files are for everybody.
    """
    if not roles.experiments:
        return Ruling(True, "the roles file lists no experiment")
    trusted = roles.may(caller, Action.request)
    if trusted:
        return trusted
    for experiment in what.experiments:
        listed = [name for name in roles.experiments if name.casefold() == experiment.casefold()]
        rulings = [roles.may(caller, Action.request, experiment=name) for name in listed]
        if rulings and not any(rulings):
            return Ruling(False, f"exp={experiment}: {rulings[0].rule}")
        if not rulings and experiment.isdigit():
            # psana1 takes numbers for experiments, and nobody knows here which it is.
            return Ruling(False, f"exp={experiment} is a number, write the experiment's name; {trusted.rule}")
    opened = [PurePosixPath(folder) for folder in folders]
    for path in what.paths:
        if not any(_below(path, folder) for folder in opened):
            open_ones = ", ".join(map(str, opened)) or "none"
            return Ruling(
                False,
                f"{path} is below no folder that is open to all (open_folders: {open_ones}): name the data by their "
                f"experiment (exp=), or ask an operator; {trusted.rule}",
            )
    if what.live is not None:
        return Ruling(False, f"{what.live} gives the data of whatever is being measured; {trusted.rule}")
    return Ruling(True, "its experiments are the caller's, or not listed")


def _below(path: str, folder: PurePosixPath) -> bool:
    pure = PurePosixPath(path)
    # A path that goes up, or begins at a home folder, leads elsewhere than it looks.
    return pure.is_absolute() and ".." not in pure.parts and pure.is_relative_to(folder)
