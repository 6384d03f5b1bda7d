"""A short run of the fuzzer; `fuzz_wire.py` says how to let it run for longer."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from nngstream.wire import sp, zmtp

FUZZER = Path(__file__).with_name("fuzz_wire.py")


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris: pip install lclstream[dev]")
def test_a_fuzzer_finds_nothing_that_the_parsers_read_otherwise_than_the_specifications(tmp_path):
    frame = zmtp.ZMTP.header(3, False) + b"abc"
    long = zmtp.ZMTP.header(300, False) + bytes(300)
    for number, seed in enumerate(
        [
            b"\x00\x05\x2f" + sp.SP.header(3) + b"abc",
            b"\x01\x05\x2f" + sp.SP_IPC.header(3) + b"abc",
            b"\x02\x05\x2f" + frame,
            b"\x02\x10\x1f" + long + zmtp.ping(1) + zmtp.ZMTP.header(3, True) + b"abc" + frame,
            b"\x02\xff\x00" + zmtp.greeting() + zmtp.ready("PUSH"),
        ]
    ):
        (tmp_path / str(number)).write_bytes(seed)
    words = [str(FUZZER), "-runs=8000", "-max_total_time=20", "-max_len=1200", "-seed=1", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done " in done.stderr
