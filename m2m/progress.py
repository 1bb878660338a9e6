"""How a running stage is heard: progress bars on a terminal, log lines elsewhere, Dagster Pipes when launched by it.

Belongs here: talking. Not here: what is said; deciding anything from it. The only module that knows `dagster_pipes`.
"""

import base64
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from m2m import processes
from m2m.artifacts import Manifest, Summary, read_summary

Item = TypeVar("Item")
Beside: TypeAlias = Callable[[Manifest, Path, Callable[[str], None]], Mapping[str, Any]]
"""More Pipes metadata of an output, and somebody to tell of what can't be said of it."""
_LOG_EVERY_SECONDS = 10.0
_PICTURE_LIMIT = 400_000  # bytes of one picture in an event; Dagster keeps events in its database


class Progress:
    """Progress for people: tqdm on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    @property
    def job(self) -> Mapping[str, str]:
        """What this run is a part of, by names for people; empty where somebody just typed a command."""
        return {}

    def log(self, message: str) -> None:
        """Say one line."""
        if not self._quiet:
            print(message, file=sys.stderr, flush=True)

    def each(
        self, items: Iterable[Item], *, total: int | None = None, unit: str = "it", label: str = ""
    ) -> Iterator[Item]:
        """Yield the items, showing how far it is."""
        if total is None and hasattr(items, "__len__"):
            total = len(items)  # type: ignore[arg-type]
        if self._quiet:
            yield from items
            return
        if sys.stderr.isatty():
            from tqdm import tqdm

            yield from tqdm(items, total=total, unit=unit, desc=label or None, dynamic_ncols=True)
            return
        units = f"{unit}es" if unit.endswith("ch") else f"{unit}s"
        started = last = time.monotonic()
        done = 0
        for done, item in enumerate(items, 1):
            yield item
            if time.monotonic() - last >= _LOG_EVERY_SECONDS:
                last = time.monotonic()
                of = f" of {total:,}" if total else ""
                self.log(f"{label or unit}: {done:,}{of} {units}, {done / (last - started):.2f} a second")
        if time.monotonic() - started >= _LOG_EVERY_SECONDS:
            self.log(f"{label or unit}: {done:,} {units} in {time.monotonic() - started:.0f} s")

    def made(self, manifest: Manifest, folder: Path, *, shards: list[str] | None, fresh: bool) -> None:
        """An output is whole.

        Args:
            shards: partition keys.
            fresh: whether this run made it.
        """

    def kept(self, counts: Mapping[str, int], checks: Mapping[str, str | None], *, fingerprint: str, why: str) -> None:
        """Shards were made and kept, but others are missing: no output is whole yet. A check of None awaits that."""

    def failed_check(self, name: str, why: str) -> None:
        """A promise of the stage does not hold."""


class PipesProgress(Progress):
    """Also tells Dagster: log lines, materializations with figures and pictures, check results."""

    def __init__(self, context: Any, beside: Beside | None = None) -> None:
        super().__init__()
        self._context, self._beside = context, beside

    @property
    def job(self) -> Mapping[str, str]:
        return {"Dagster run": self._context.run_id, "Dagster job": str(self._context.job_name)}

    def log(self, message: str) -> None:
        self._context.log.info(message)

    def made(self, manifest: Manifest, folder: Path, *, shards: list[str] | None, fresh: bool) -> None:
        summary = read_summary(folder) if (folder / "summary.json").exists() else Summary()
        metadata = pipes_metadata(manifest, summary, folder)
        if self._beside is not None:
            metadata |= self._beside(manifest, folder, self.log)
        metadata["made_by_this_run"] = {"raw_value": fresh, "type": "bool"}
        self._context.report_asset_materialization(metadata=metadata, data_version=manifest.fingerprint)
        for name, why in summary.checks.items():
            self._context.report_asset_check(check_name=name, passed=not why, metadata={"why": why or "holds"})

    def kept(self, counts: Mapping[str, int], checks: Mapping[str, str | None], *, fingerprint: str, why: str) -> None:
        metadata = {**counts, "fingerprint": fingerprint[:16], "not_whole_yet": why}
        self._context.report_asset_materialization(metadata=metadata, data_version=fingerprint)
        for name, found in checks.items():
            self._context.report_asset_check(
                check_name=name,
                passed=found == "",
                severity="WARN",  # which does not block; what is broken has failed the stage before this
                metadata={"why": why if found is None else "holds"},
            )

    def failed_check(self, name: str, why: str) -> None:
        self._context.report_asset_check(check_name=name, passed=False, severity="ERROR", metadata={"why": why})


def pipes_metadata(manifest: Manifest, summary: Summary, folder: Path) -> dict[str, Any]:
    """Counts, figures, tables and pictures of an output as Pipes metadata values."""
    size = sum(record.size for record in manifest.files)
    metadata: dict[str, Any] = {
        "fingerprint": manifest.fingerprint[:16],
        "files": len(manifest.files),
        "size_mb": round(size / 1e6, 3),
        "path": {"raw_value": str(folder), "type": "path"},
    }
    metadata |= manifest.counts
    metadata |= {name: value for name, value in summary.figures.items() if value is not None}
    for name, rows in summary.tables.items():
        metadata[name] = {"raw_value": _markdown_table(rows), "type": "md"}
    pictures = {
        caption: (path.rsplit(".", 1)[-1], (folder / path).read_bytes()) for caption, path in summary.pictures.items()
    }
    if summary.curves:
        from m2m.evaluation import charts  # the report's own, without the report

        pictures |= {name: ("svg+xml", charts.picture(name, of).encode()) for name, of in summary.curves.items()}
    for caption, (kind, content) in pictures.items():
        if 0 < len(content) <= _PICTURE_LIMIT:  # Dagster has no picture metadata, but shows data URIs in markdown
            uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
            metadata[caption] = {"raw_value": f"![{caption}]({uri})", "type": "md"}
    return metadata


@contextlib.contextmanager
def open_progress(beside: Beside | None = None) -> Iterator[Progress]:
    """Progress that fits where we run: Pipes when Dagster launched us, plain otherwise.

    Of several processes that make one output only the first speaks.

    Args:
        beside: what Dagster is shown of an output beside its own figures.
    """
    if not processes.leads():
        yield Progress(quiet=True)
        return
    from dagster_pipes import PipesEnvVarParamsLoader, open_dagster_pipes

    if not PipesEnvVarParamsLoader().is_dagster_pipes_process():
        yield Progress()
        return
    with open_dagster_pipes() as context:
        yield PipesProgress(context, beside)


def _markdown_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "(empty)"
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else json.dumps(value).strip('"')
