"""Files of calibration constants: what is read, and that nothing in them is run."""

from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lclstreamer.errors import SourceError
from lclstreamer.sources import psana2

VALUES: dict[str, Any] = {
    "pedestals": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "turned": np.asfortranarray(np.arange(6, dtype=np.uint16).reshape(2, 3)),
    "other end": np.arange(3, dtype=">f8"),
    "every second": np.arange(10, dtype=np.int64)[::2],
    "empty": np.empty((0, 4), np.uint64),
    "single": np.array(3.5),
    "flags": np.array([True, False]),
    "complex": np.array([1 + 2j]),
    "names": np.array(["a", "Ångström"]),
    "bytes": np.array([b"ab", b""]),
}
ABOUT = {
    "experiment": "mfx100", "run": np.int64(7), "gain": np.float32(1.5), "raw": b"\x00\xff", "nothing": b"",
    "list": [1, (2, None), {"x": {3}}], "ordered": collections.OrderedDict(a=1), "array": np.ones(2), "z": 1j,
    "dtype": np.dtype("<u2"), "word": np.str_("é"),
}  # fmt: skip


def read(path: Path) -> Any:
    return psana2.constants.read(path)


def renamed(content: bytes, protocol: int) -> bytes:
    """As numpy 1 would have written it."""
    assert b"numpy._core." in content
    if protocol < 4:
        return content.replace(b"numpy._core.", b"numpy.core.")
    frameless = pickle.PROTO + bytes([protocol]) + content[11:]  # the frame would have another length
    for module in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        old, new = module, module.replace(b"_core", b"core")
        frameless = frameless.replace(
            pickle.SHORT_BINUNICODE + bytes([len(old)]) + old, pickle.SHORT_BINUNICODE + bytes([len(new)]) + new
        )
    return frameless


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("older", [False, True], ids=["numpy 2", "numpy 1"])
def test_constants_come_back_as_they_were(tmp_path: Path, protocol: int, older: bool) -> None:
    kinds = {kind: (array, ABOUT) for kind, array in VALUES.items()}
    content = pickle.dumps({"calib_const": {"jungfrau": kinds, "none": None}, "det_info": {}}, protocol)
    path = tmp_path / "constants.pkl"
    path.write_bytes(renamed(content, protocol) if older else content)
    found = read(path)
    assert found["none"] == {}
    assert set(found["jungfrau"]) == set(VALUES)
    for kind, (array, about) in found["jungfrau"].items():
        assert type(array) is np.ndarray
        np.testing.assert_array_equal(array, VALUES[kind], strict=True)
        assert array.flags.writeable
        assert {key: value for key, value in about.items() if key != "array"} == {
            key: value for key, value in ABOUT.items() if key != "array"
        }
        assert type(about["run"]) is np.int64
        np.testing.assert_array_equal(about["array"], ABOUT["array"])


class _Command:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "argument"),
    [(os.system, "touch {0}"), (eval, "open({0!r}, 'w')"), (exec, "open({0!r}, 'w')"), (os.mkdir, "{0}")],
)
def test_a_file_that_would_run_a_command_is_refused_and_named(
    tmp_path: Path, protocol: int, function: Any, argument: str
) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "evil.pkl"
    command = _Command(function, argument.format(str(trace)))
    constants = {"calib_const": {"jungfrau": {"pedestals": (np.zeros(2), {"x": command})}}}
    path.write_bytes(pickle.dumps(constants, protocol))
    with pytest.raises(SourceError, match=rf"{path} is no file of .*it asks for .*{function.__name__}") as caught:
        read(path)
    assert "only numpy arrays" in str(caught.value)
    assert not trace.exists(), "it was run"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.array([None, {}], dtype=object), "arrays of type 'O8' are not read"),
        (np.zeros(2, [("a", "f4")]), "structured arrays|arrays of type 'V4' are not read"),
        (_Command(np.load, "x"), "it asks for numpy.*load"),
        (_Command(getattr, [], "append"), "it asks for .*getattr"),
        (_Command(np.ndarray, (1 << 20,)), "takes no arguments"),
        (Path("x"), "it asks for pathlib"),
    ],
)
def test_what_constants_do_not_need_is_refused(tmp_path: Path, value: Any, words: str) -> None:
    path = tmp_path / "strange.pkl"
    path.write_bytes(pickle.dumps({"calib_const": {"jungfrau": {"pedestals": (value, {})}}}, 4))
    with pytest.raises(SourceError, match=words):
        read(path)


def test_a_file_that_contains_itself_is_refused(tmp_path: Path) -> None:
    about: dict[str, Any] = {}
    about["about"] = about
    path = tmp_path / "circle.pkl"
    path.write_bytes(pickle.dumps({"calib_const": {"jungfrau": {"pedestals": (np.zeros(2), about)}}}))
    with pytest.raises(SourceError, match=r"circle\.pkl is no file of calibration constants"):
        read(path)
