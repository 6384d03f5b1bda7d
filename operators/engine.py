"""Run the engine as a batch job that writes a run's reduced data into files where they are analysed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from lclstream_airflow.operators.documents import DocumentError, load_document
from lclstream_airflow.operators.lineage import lineage
from lclstream_airflow.operators.psik import PsikOperator

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from airflow.sdk import Context

_CONFIG = "lclstreamer.json"
_END = "END_OF_CONFIGURATION"
#: A prefix becomes part of file names and of a shell pattern.
_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SCRIPT = """\
mkdir -p "$LCLSTREAM_FOLDER"
rm -f "$LCLSTREAM_FOLDER/$LCLSTREAM_PREFIX"_r*.h5
{launcher}lclstreamer --config "$LCLSTREAM_CONFIG"
lclstream collect "$LCLSTREAM_FOLDER" --prefix "${{LCLSTREAM_PREFIX}}_r" \\
  --output "$LCLSTREAM_FOLDER/$LCLSTREAM_PREFIX.h5" --result result.json
"""


class EngineJobOperator(PsikOperator):
    """Runs the engine as a job: it reads a run's files, reduces them, and writes HDF5 files.

    Each rank writes ``FOLDER/PREFIX_r<rank>_<number>.h5``; ``FOLDER/PREFIX.h5`` is one file over them all. Files of an
    earlier try of the same run are replaced. The result has ````file events files bytes````.

    :param config: the engine's configuration: an object, its text, or the absolute path of a file on the worker. Its
        `data_handlers` are replaced by one that writes files
    :param folder: where at the computing centre the files go; an absolute path
    :param prefix: what their names begin with, such as ``mfx100-r0007``
    :param ranks: MPI ranks
    :param job: what else the job needs: `resources`, `backend`, `attributes`, `environment`, and a `script` of its own,
        which finds ``LCLSTREAM_CONFIG``, ``LCLSTREAM_FOLDER`` and ``LCLSTREAM_PREFIX`` in its environment and runs
        where the configuration is
    :param values: what ``{{ name }}`` stands for in the configuration and the job

    Further arguments: see :class:`.PsikOperator`.
    """

    template_fields: Sequence[str] = (*PsikOperator.template_fields, "config", "folder", "prefix", "ranks")
    template_fields_renderers: ClassVar[dict[str, str]] = {
        **PsikOperator.template_fields_renderers,
        "config": "yaml",
    }

    def __init__(
        self,
        *,
        config: Mapping[str, Any] | str,
        folder: str,
        prefix: str,
        ranks: int | str | None = 1,
        job: Mapping[str, Any] | str | None = None,
        result_file: str | None = "result.json",
        **kwargs: Any,
    ) -> None:
        super().__init__(job=job or {}, result_file=result_file, **kwargs)
        self.config = config
        self.folder = folder
        self.prefix = prefix
        self.ranks = ranks

    def prepare(self, context: Context) -> None:
        """See :meth:`RemoteWorkOperator.prepare`."""
        if not PurePosixPath(self.folder or "").is_absolute():
            raise DocumentError(f"folder is {self.folder!r}: an absolute path at the computing centre is needed")
        if not _PREFIX.fullmatch(self.prefix or ""):
            raise DocumentError(f"prefix is {self.prefix!r}: letters, digits and `._-` make a file's name")
        ranks = int(self.ranks or 1)
        values = self.values or {}
        config = load_document(self.config, values, "config")
        config["data_handlers"] = [
            {"type": "BinaryFileWritingDataHandler", "write_directory": self.folder, "file_prefix": self.prefix}
        ]
        job = load_document(self.job or {}, values, "job")
        job.setdefault("name", self.prefix)
        resources = job["resources"] = dict(job.get("resources") or {})
        resources.setdefault("process_count", ranks)
        # Part of the script, and so of the specification: another configuration is another job.
        job["script"] = _with_config(job.get("script"), config, "$mpirun " if ranks > 1 else "")
        self.job = job
        self.environment = {
            **(self.environment or {}),
            "LCLSTREAM_CONFIG": _CONFIG,
            "LCLSTREAM_FOLDER": self.folder,
            "LCLSTREAM_PREFIX": self.prefix,
        }
        super().prepare(context)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:
        """The engine's source, and the file of the run at the computing centre, for OpenLineage."""
        del task_instance
        config = load_document(self.config, self.values or {}, "config")
        where = urlsplit(self.hook.jobs_url()).hostname or ""
        source = ("lclstream", str(config.get("source_identifier") or ""))
        return lineage([source], [(f"file://{where}", f"{self.folder}/{self.prefix}.h5")])

    def _document(self) -> dict[str, Any]:
        # Its places are filled; braces in the configuration's text must stay.
        assert isinstance(self.job, dict)
        return self.job


def _with_config(script: str | None, config: Mapping[str, Any], launcher: str) -> str:
    first, body = "#!/bin/sh", "set -eu\n" + _SCRIPT.format(launcher=launcher)
    if script is not None:
        first, _, body = script.partition("\n") if script.startswith("#!") else (first, "", script)
    # One line of JSON: it cannot hold the line that ends it.
    return f"{first}\ncat > {_CONFIG} <<'{_END}'\n{json.dumps(config)}\n{_END}\n{body}"
