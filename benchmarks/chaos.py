"""What survives when things are killed: ``python benchmarks/chaos.py transfers|arp|airflow``.

Prints a table for people and, with ``--json FILE``, the same for programs. Ends with 1 when something was lost, left
behind, or done twice.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

from stopping import stop_on_signals

#: Sub-command -> the module that does it (`add_arguments`, `main`), and the counts that must be zero.
COMMANDS = {
    "arp": ("chaos_arp", ("lost", "duplicated")),
    "airflow": ("chaos_airflow", ("left_running",)),
    "transfers": ("chaos_transfers", ("leaked_ports", "leaked_jobs", "stuck", "wrong_end")),
}


def _table(result: dict[str, Any]) -> str:
    counts = {key: value for key, value in result.items() if key != "rows"}
    width = max(len(key) for key in counts)
    lines = [f"{key.replace('_', ' '):<{width}}  {value}" for key, value in counts.items()]
    rows: list[dict[str, Any]] = result.get("rows", [])
    if rows:
        wide = {key: max(len(key), *(len(_cell(row[key])) for row in rows)) for key in rows[0]}
        lines += ["", "  ".join(f"{key.replace('_', ' '):<{size}}" for key, size in wide.items())]
        lines += ["  ".join(f"{_cell(row[key]):<{size}}" for key, size in wide.items()) for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def main() -> int:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {}
    for name, (module_name, _) in COMMANDS.items():
        modules[name] = importlib.import_module(module_name)
        command = commands.add_parser(name, help=(modules[name].__doc__ or "").splitlines()[0])
        command.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
        modules[name].add_arguments(command)
    arguments = parser.parse_args()
    result: dict[str, Any] = modules[arguments.command].main(arguments)
    result["machine"] = f"{platform.node()} {platform.machine()}, Python {platform.python_version()}"
    print(_table(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(result[key] for key in COMMANDS[arguments.command][1]))


if __name__ == "__main__":
    stop_on_signals()
    sys.exit(main())
