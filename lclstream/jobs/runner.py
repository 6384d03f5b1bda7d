"""The process that runs one attempt of a job's script, bounds it, and writes down how it ended.

Started by a backend as ``python -I -S runner.py CONTROL JOBNDX`` with the job's control folder and the number of the
attempt; standard library only, so that it starts in milliseconds and needs nothing on a compute node but Python. It
outlives the service: what it writes into ``CONTROL/JOBNDX`` is the truth the service reads, now or after a restart.

===============  ====================================================================================================
``plan.json``    read from CONTROL: what to run (`argv, directory, environment, inherit_environment, keep_environment,
                 walltime_s, grace_s, log`)
``runner.json``  written first, by whichever runner comes first: who runs it (`pid, start_ticks, boot_id, host, nodes,
                 jobid, time`)
``exit.json``    written last: how it ended (`reason`: exit, walltime, terminated or error; `code, message, time`)
===============  ====================================================================================================

One thread does everything: it waits for the script, for its time to be over, and for a signal. It adopts every process
the script leaves behind, and ends only when all of them are gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

#: Exit status of a runner that found another one at work.
SUPERSEDED = 75
_ASKED_TO_STOP = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_WATCHED = _ASKED_TO_STOP | {signal.SIGCHLD}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
#: Seconds to wait for killed processes to disappear; one in an uninterruptible system call can stay longer.
KILLED_WITHIN_S = 10.0


def boot_id() -> str:
    """The machine's present boot: process ids and start times mean nothing after another."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def stat_of(pid: int) -> tuple[str, int, int, int] | None:
    """State letter, parent, session and start time (clock ticks since boot) of a process; None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The program's name is in parentheses and may itself hold spaces and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[1]), int(fields[3]), int(fields[19])


def is_alive(pid: int, start_ticks: int) -> bool:
    """Whether that very process still runs: not a zombie, and not another one with its number."""
    status = stat_of(pid)
    return status is not None and status[0] not in "ZX" and status[3] == start_ticks


def processes() -> dict[int, tuple[str, int, int, int]]:
    """All processes of the machine; see :func:`stat_of`."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (status := stat_of(int(name))) is not None:
            found[int(name)] = status
    return found


def write_once(path: Path, document: dict[str, Any]) -> None:
    """Write a file that is there completely or not at all.

    Raises:
        FileExistsError: another process wrote it first.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
    finally:
        os.unlink(temporary)


class _Script:
    """A running script with everything it started."""

    def __init__(self, plan: dict[str, Any], jobndx: str, jobid: str, libc: ctypes.CDLL) -> None:
        kept = ("",) if plan["inherit_environment"] else tuple(plan["keep_environment"])
        environment = {name: value for name, value in os.environ.items() if name.startswith(kept)}
        environment.update(plan["environment"], jobndx=jobndx, jobid=jobid)
        if "nodes" not in environment:
            environment["nodes"] = os.environ.get("SLURM_JOB_NUM_NODES", "1")
        self._runner = os.getpid()
        ignored = [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]

        def in_child() -> None:
            # The runner blocks the signals it waits for; the script must not inherit that. And it dies with its
            # runner, because nobody else would enforce its duration.
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            # A service started in the background by a shell ignores Ctrl-C; its jobs must not.
            for number in ignored:
                signal.signal(number, signal.SIG_DFL)
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

        log = Path(plan["log"])
        with open(log / f"stdout.{jobndx}", "ab") as stdout, open(log / f"stderr.{jobndx}", "ab") as stderr:
            process = subprocess.Popen(
                plan["argv"],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=plan["directory"],
                env=environment,
                process_group=0,
                preexec_fn=in_child,
            )
        self.pid = process.pid
        # Popen would collect the exit status of a script that ends at once, when it is itself deleted here.
        process.returncode = 0
        self.code: int | None = None

    def reap(self) -> bool:
        """Collect the ended children, adopted ones too; True when there is no other child."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            if pid == self.pid:
                self.code = os.waitstatus_to_exitcode(status)

    def _descendants(self) -> set[tuple[int, int]]:
        """Living processes below the runner: process id and start time."""
        children: dict[int, list[int]] = {}
        everybody = processes()
        for pid, (state, parent, _, _) in everybody.items():
            if state not in "ZX":
                children.setdefault(parent, []).append(pid)
        found: set[tuple[int, int]] = set()
        unseen = [self._runner]
        while unseen:
            inner = children.get(unseen.pop(), [])
            found.update((pid, everybody[pid][3]) for pid in inner)
            unseen += inner
        return found

    def end_all(self, grace_s: float) -> bool:
        """SIGTERM, then SIGKILL after a grace time; False when something survived even that."""
        for number, bound in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILLED_WITHIN_S)):
            deadline = time.monotonic() + bound
            told: set[tuple[int, int]] = set()
            while True:
                childless = self.reap()
                present = self._descendants()
                # One that was started while we looked at the others is not among them; it is our child, or will be.
                if childless and not present:
                    return True
                # A process can start another one while it is being stopped; a shell then waits for that one.
                for pid, _ in present - told:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                told |= present
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                signal.sigtimedwait({signal.SIGCHLD}, min(left, 0.05))
        return not self._descendants()


def run(control: Path, jobndx: str, ready: int | None) -> int:
    """Run one attempt of the job whose control folder this is; returns the exit status of the runner."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    plan = json.loads((control / "plan.json").read_text())
    folder = control / jobndx
    folder.mkdir(exist_ok=True)
    jobid = os.environ.get("SLURM_JOB_ID", str(os.getpid()))
    status = stat_of(os.getpid())
    claim = {
        "pid": os.getpid(),
        "start_ticks": status[3] if status else 0,
        "boot_id": boot_id(),
        "host": socket.gethostname(),
        "nodes": os.environ.get("SLURM_JOB_NODELIST", socket.gethostname()),
        "jobid": jobid,
        "time": time.time(),
    }
    try:
        write_once(folder / "runner.json", claim)
    except FileExistsError:
        return SUPERSEDED
    if ready is not None:
        os.close(ready)
    outcome = _follow(plan, jobndx, jobid, libc)
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {outcome['message']}", flush=True)
    write_once(folder / "exit.json", outcome)
    return 0 if outcome["code"] == 0 else 1


def _follow(plan: dict[str, Any], jobndx: str, jobid: str, libc: ctypes.CDLL) -> dict[str, Any]:
    try:
        script = _Script(plan, jobndx, jobid, libc)
    except OSError as error:
        message = f"the script cannot be started: {error.strerror}: {error.filename or plan['argv'][0]}"
        return {"reason": "error", "code": None, "message": message, "time": time.time()}
    deadline = time.monotonic() + plan["walltime_s"]
    reason = "exit"
    while script.code is None:
        left = deadline - time.monotonic()
        happened = signal.sigtimedwait(_WATCHED, left) if left > 0 else None
        if happened is None:
            reason = "walltime"
            break
        if happened.si_signo in _ASKED_TO_STOP:
            reason = "terminated"
            break
        script.reap()
    ended = time.time()
    clean = script.end_all(plan["grace_s"])
    message = {
        "exit": f"exit code {script.code}",
        "walltime": f"duration of {plan['walltime_s'] / 60:g} min exceeded",
        "terminated": "terminated",
    }[reason]
    if reason == "exit" and script.code is not None and script.code < 0:
        message = f"killed by signal {-script.code} ({signal.strsignal(-script.code)})"
    if not clean:
        message += "; some of its processes cannot be killed"
    return {
        "reason": reason,
        "code": script.code,
        "message": message,
        "time": ended if reason == "exit" else time.time(),
    }


def main() -> int:
    """``runner.py CONTROL JOBNDX [READY]``: READY is a descriptor closed when the attempt is this runner's."""
    return run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)


if __name__ == "__main__":
    sys.exit(main())
