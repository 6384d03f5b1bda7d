"""The ranks of a run: MPI where the program was started by it, a single rank otherwise.

Only the main thread talks to MPI. Waiting for other ranks polls and sleeps, since MPI's own waiting keeps a core busy.
"""

from __future__ import annotations

import os
import time
from typing import Any, Protocol

from lclstreamer.errors import EngineError

_POLL_S = 0.02
_TAG_REPORT = 7101
_TAG_GO = 7102


class Ranks(Protocol):
    """What the engine needs of the ranks."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any] | None:
        """Everybody's value on rank 0, in rank order; `None` elsewhere. All ranks must call it."""

    def agree(self, value: Any) -> list[Any]:
        """Everybody's value on every rank, in rank order. All ranks must call it."""

    def abort(self, code: int) -> None:
        """End all ranks at once with this exit code."""


class OneRank:
    """A run without MPI."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any] | None:
        """The one value."""
        return [value]

    def agree(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]

    def abort(self, code: int) -> None:
        """Nobody else is there to end."""


class MPIRanks:
    """The ranks of ``MPI.COMM_WORLD``."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        # A communicator of our own: psana sends its messages on the world.
        self._comm: Any = MPI.COMM_WORLD.Dup()
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()

    def gather(self, value: Any) -> list[Any] | None:
        """See :class:`Ranks`.

        No rank leaves before rank 0 has all values: a rank that waits in `MPI_Finalize` keeps a core busy.
        """
        if self.rank:
            self._wait(self._comm.isend(value, dest=0, tag=_TAG_REPORT))
            self._receive(0, _TAG_GO)
            return None
        values = [value] + [None] * (self.size - 1)
        for rank in range(1, self.size):
            values[rank] = self._receive(rank, _TAG_REPORT)
        for rank in range(1, self.size):
            self._wait(self._comm.isend(None, dest=rank, tag=_TAG_GO))
        return values

    def agree(self, value: Any) -> list[Any]:
        """See :class:`Ranks`."""
        values = self.gather(value)
        if self.rank:
            return list(self._receive(0, _TAG_REPORT))
        for rank in range(1, self.size):
            self._wait(self._comm.isend(values, dest=rank, tag=_TAG_REPORT))
        return list(values or [])

    def abort(self, code: int) -> None:
        """See :class:`Ranks`."""
        self._comm.Abort(code)

    def _receive(self, source: int, tag: int) -> Any:
        while not self._comm.iprobe(source=source, tag=tag):
            time.sleep(_POLL_S)
        return self._comm.recv(source=source, tag=tag)

    def _wait(self, request: Any) -> None:
        while not request.test()[0]:
            time.sleep(_POLL_S)


def started_ranks() -> int:
    """How many ranks the starter of this process says there are (1 without MPI)."""
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PALS_SIZE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    # srun without PMI sets only its own variables, also for programs that are no MPI programs: PMIx tells them apart.
    if "PMIX_RANK" in os.environ and os.environ.get("SLURM_NTASKS", "").isdigit():
        return int(os.environ["SLURM_NTASKS"])
    return 1


def connect() -> Ranks:
    """The ranks of this run.

    Raises:
        EngineError: started by mpiexec, but mpi4py is missing or sees another number of ranks. Going on would make
            every rank read all events.
    """
    size = started_ranks()
    if size == 1:
        return OneRank()
    try:
        ranks = MPIRanks()
    except ImportError as error:
        raise EngineError(
            f"started as one of {size} MPI ranks, but mpi4py cannot be imported ({error}): install the `mpi` extra, "
            "or start a single process without mpiexec"
        ) from error
    if ranks.size != size:
        raise EngineError(
            f"mpiexec started {size} ranks, but mpi4py sees {ranks.size}: mpiexec and mpi4py are of different MPI "
            "libraries; use the mpiexec that belongs to mpi4py's library"
        )
    return ranks
