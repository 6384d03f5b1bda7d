"""A real Slurm of one node with folder, keys and ports of its own; for measurements and tests. It needs root.

From Debian's packages: ``apt-get install slurm-wlm munge``. No systemd, no cgroups; starting takes a second. Its
daemons listen on the loopback address only. A second process ends them when it is told to, or when whoever started them
has died, however he died.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_PROGRAMS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "slurmctld", "slurmd", "munged")
#: Debian installs the daemons where an ordinary user's PATH does not look.
_SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin")
_START_S = 30.0
#: Seconds within which all daemons and jobs have ended.
_STOP_S = 60.0
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=5
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
"""


class NoSlurmError(RuntimeError):
    """Slurm cannot be run here; the message says why, and what would help."""


class Slurm:
    """The cluster; use it in a ``with``.

    Attributes:
        configuration: its file, for ``SLURM_CONF``.
        folder: where everything of it lies; removed at the end.

    Raises:
        NoSlurmError: it is not installed, or does not start.
    """

    def __init__(self) -> None:
        self._path = os.pathsep.join([os.environ["PATH"], *_SBIN])
        missing = [name for name in _PROGRAMS if shutil.which(name, path=self._path) is None]
        if missing:
            raise NoSlurmError(
                f"Slurm is not installed here (no {', '.join(missing)}): apt-get install slurm-wlm munge"
            )
        if os.geteuid() != 0:
            raise NoSlurmError("a Slurm node of one's own needs root here")
        self.folder = Path(tempfile.mkdtemp(prefix="lclstream-slurm-"))
        self.configuration = self.folder / "slurm.conf"
        # It notices the end of its standard input, which comes with our own end, too.
        self._ending = subprocess.Popen(
            [sys.executable, __file__, str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
        )

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def _start(self) -> None:
        folder = self.folder
        folder.chmod(0o755)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        host = socket.gethostname().split(".")[0]
        self.configuration.write_text(
            _CONFIGURATION.format(
                host=host, ports=_two_ports(), folder=folder, user=getpass.getuser(), cores=os.cpu_count()
            )
        )
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{option}={folder}/munge.{end}" for option, end in (("socket", "socket"), ("seed-file", "seed"))]
        munge = ["munged", f"--key-file={key}", f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munge.log"]
        self.command(*munge, *files)
        self.command("slurmctld", "-f", str(self.configuration))
        self.command("slurmd", "-f", str(self.configuration), "-N", host)
        deadline = time.monotonic() + _START_S
        while (said := self.command("sinfo", "-h", "-o", "%t")) != "idle":
            if time.monotonic() > deadline:
                raise NoSlurmError(f"Slurm does not start here: {said}")
            time.sleep(0.1)

    def command(self, *words: str) -> str:
        """Run one of Slurm's commands against this cluster; returns what it said."""
        done = subprocess.run(
            [shutil.which(words[0], path=self._path) or words[0], *words[1:]],
            env={**os.environ, "PATH": self._path, "SLURM_CONF": str(self.configuration)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()

    def close(self) -> None:
        """Have everything ended, and wait until it has."""
        if self._ending.stdin is not None:
            self._ending.stdin.close()
        self._ending.wait(2 * _STOP_S)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _end(folder: Path) -> None:
    """Stop the daemons by the ids in their own files, then what is left of jobs, and remove the folder."""
    for name in ("slurmd", "slurmctld", "munged"):
        try:
            process = psutil.Process(int((folder / f"{name}.pid").read_text()))
            process.terminate()
            process.wait(_STOP_S / 3)
        except (OSError, ValueError, psutil.NoSuchProcess):
            continue
        except psutil.TimeoutExpired:
            process.kill()
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and _is_of_a_job(process, str(folder / "slurm.conf")):
                process.kill()
        except psutil.Error:
            continue
    shutil.rmtree(folder, ignore_errors=True)


def _is_of_a_job(process: psutil.Process, configuration: str) -> bool:
    """Whether it belongs to a job of this cluster; who only sends jobs here, as our services do, is left alone."""
    environment = process.environ()
    return environment.get("SLURM_CONF") == configuration and (
        "SLURM_JOB_ID" in environment or process.name() == "slurmstepd"
    )


def _two_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    _end(Path(sys.argv[1]))
