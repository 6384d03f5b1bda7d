"""JSON that jobs have written, read so that Airflow can keep it.

Python's writers, numpy's floats among them, put bare ``NaN`` and ``Infinity`` into JSON. Airflow's client refuses such
numbers in an XCom, and its database in a trigger's event: one of them would fail a good job, hours after it has ended.
So they become text, as in what the run processor hands to a DAG run.
"""

from __future__ import annotations

import json
import math
from typing import Any


def read_json(data: bytes | str) -> Any:
    """The value in a JSON text; numbers that are not finite as ``"NaN"``, ``"Infinity"``, ``"-Infinity"``.

    Raises:
        ValueError: it is not JSON.
    """
    return json.loads(data, parse_constant=str, parse_float=_finite_or_text)


def _finite_or_text(digits: str) -> float | str:
    # 1e999 is proper JSON, and infinite for Python.
    value = float(digits)
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
