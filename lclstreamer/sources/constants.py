"""Calibration constants from a pickle file, as psana's ``calib_prefetch`` writes it, read without running what it says.

A pickle is a program. Whoever may ask for a transfer names this file, and the engine reads it as its own account: what
the file may name are numpy's arrays, numbers and types and Python's own containers, each made by a function below, and
nothing of it gets as far as being called otherwise.
"""

from __future__ import annotations

import collections
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lclstreamer.errors import SourceError

#: psana prints where constants come from, and fails when they do not say.
_UNSAID = {"experiment": "unknown", "run": 0}
#: Types whose bytes are their values: a pickled description of others may name memory that is not there.
_SIMPLE = re.compile(r"\|?[biufc?]\d*|[SU]\d+")


class _Refused(pickle.UnpicklingError):
    """The file names something that constants do not need."""


class _Dtype:
    """A numpy type while it is read: numpy's own takes any description for true."""

    def __init__(self, code: Any, _align: Any = False, _copy: Any = True) -> None:
        if not isinstance(code, str) or not _SIMPLE.fullmatch(code):
            raise _Refused(f"arrays of type {code!r} are not read: use numbers, booleans or strings")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        order, subtype, names, fields = state[1:5]
        if (subtype, names, fields) != (None, None, None):
            raise _Refused("structured arrays are not read: use one array for each field")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """An array while it is read: an empty one first, its content follows."""

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self.array = _from_buffer(content, dtype, shape, "F" if fortran else "C")


def _from_buffer(content: Any, dtype: _Dtype, shape: Any, order: str) -> Any:
    # A copy: what was read stands in memory that cannot be written to.
    flat = np.frombuffer(content, dtype.dtype) if len(content) else np.empty(0, dtype.dtype)
    return flat.reshape(shape, order="F" if order == "F" else "C").copy(order="K")


def _scalar(dtype: _Dtype, content: Any) -> Any:
    return np.frombuffer(content, dtype.dtype)[0] if len(content) else dtype.dtype.type()


def _encoded(text: str, _encoding: str) -> bytes:
    """What protocols before 3, which have no bytes, make of them."""
    return text.encode("latin1")


class _Ndarray:
    """What stands for the class; a call of it would take any memory for an array."""


_BUILTINS: tuple[type, ...] = (bytes, bytearray, set, frozenset, complex)
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Ndarray,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encoded,
    ("collections", "OrderedDict"): collections.OrderedDict,
    # numpy 1 and 2 call the same things by different names.
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    **{(module, one.__name__): one for module in ("builtins", "__builtin__") for one in _BUILTINS},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(
                f"it asks for {module}.{name}, and only numpy arrays, numbers, strings and containers of them are read"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused(f"it refers to {pid!r} elsewhere")


def _whole(value: Any) -> Any:
    """The same with real arrays."""
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, _Dtype):
        return value.dtype
    if isinstance(value, dict):
        return {_whole(key): _whole(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_whole(one) for one in value)
    return value


def read(path: Path) -> Mapping[str, Any]:
    """Constants by detector and kind, each with what is said about it.

    Raises:
        SourceError: no such file, or its content is something else.
    """
    try:
        with path.open("rb") as file:
            content = _whole(_Unpickler(file).load())
        return {
            detector: {kind: (array, {**_UNSAID, **(about or {})}) for kind, (array, about) in (kinds or {}).items()}
            for detector, kinds in content["calib_const"].items()
        }
    except FileNotFoundError:
        raise SourceError(
            f"event_source.calibration: file {path} does not exist; valid are auto, none, database or the path of a "
            "pickle file with calibration constants"
        ) from None
    except Exception as error:
        # A pickle that is no such file can fail in any way there is.
        raise SourceError(
            f"event_source.calibration: {path} is no file of calibration constants ({error!r}); it must be a pickled "
            "dictionary {calib_const: {detector: {kind: (array, about)}}}, as psana's calib_prefetch writes it"
        ) from error
