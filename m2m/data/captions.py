"""Captions that CLIP can read whole: the filter of the paper's section 4, and who learns from which caption.

Belongs here: reading caption files, deciding, splits. Not here: counting tokens (`m2m.data.tokens`), knowing a caption
again (`m2m.data.duplicates`).
"""

import contextlib
import hashlib
import html
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from m2m.artifacts import sync_folder
from m2m.config import Incidental, Later, SourcePath, StageConfig, resolve
from m2m.data.duplicates import SeenTexts
from m2m.data.tokens import START_AND_END, counted_batches
from m2m.errors import ArtifactError, ConfigError, InputError
from m2m.stage_run import StageRun

SPLITS = ("train", "validation", "test")
CAPTIONS, REJECTED = "captions.parquet", "rejected.parquet"
CC12M_ROWS, PAPER_KEPT = 12_423_374, 12_237_187
"""Rows of CC12M's file, and captions that the paper kept of them (section 4)."""

_LINE_LIMIT = 1 << 20  # characters; a longer "line" is no caption, and reading it whole could take all memory
_BATCH = 8192
_SMALL = 32 << 20  # bytes; a smaller source is counted before the first other process is up
_ROW_GROUP, _REJECTED_ROW_GROUP = 65_536, 8192  # rows; rejected texts are long, and they wait for each other
_UNPACK, _RECODE = "unpack it first", "convert it first, for example with iconv -f UTF-16 -t UTF-8"
_NOT_UTF8 = {  # by their first bytes: read as UTF-8 they would give rows, none of them a caption
    b"\xff\xfe": ("UTF-16", _RECODE),
    b"\xfe\xff": ("UTF-16", _RECODE),
    b"\x1f\x8b": ("compressed (gzip)", _UNPACK),
    b"BZh": ("compressed (bzip2)", _UNPACK),
    b"\xfd7zX": ("compressed (xz)", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed (zstd)", _UNPACK),
    b"PK\x03\x04": ("a zip archive", _UNPACK),
    b"PAR1": ("parquet", "write its captions as lines of url<TAB>caption"),
}
_KEPT_COLUMNS = pa.schema(
    [("id", pa.int64()), ("caption", pa.string()), ("tokens", pa.int32()), ("split", pa.string())]
)
_REJECTED_COLUMNS = pa.schema([("row", pa.int64()), ("text", pa.string()), ("reason", pa.string())])


class FilterCaptions(StageConfig):
    """Keep the captions of at most `max_tokens` CLIP tokens, and give each its split."""

    source: SourcePath = Field(
        description="TSV of `url<TAB>caption`, UTF-8, no quoting, `\\n` line ends: CC12M's layout"
    )
    max_tokens: int = Field(default=77, ge=1, description="paper, section 4")
    count_special_tokens: bool = Field(default=True, description="whether start and end count; the paper does not say")
    clean_text: bool = Field(
        default=False, description="undo HTML entities and collapse white space first; the paper does not say"
    )
    fix_text: Annotated[bool, Later()] = Field(
        default=False, description="mend wrongly decoded text (cafÃ©) with ftfy before that (`pip install 'm2m[text]'`)"
    )
    drop_duplicates: bool = Field(
        default=False, description="keep a caption once, where it comes first; the paper does not say"
    )
    validation_fraction: float = Field(
        default=0.001, ge=0, lt=1, description="of the kept captions; the paper does not say"
    )
    test_fraction: float = Field(
        default=0.001, ge=0, lt=1, description="of the kept captions; the paper has 10,000 test sets"
    )
    seed: int = Field(default=0, ge=0, description="which captions are held out")
    limit: int | None = Field(default=None, ge=1, description="read only so many rows")
    workers: Annotated[int | None, Incidental()] = Field(
        default=None,
        ge=0,
        description="processes that count tokens; by default one a core, or for a source of up to 32 MB this one alone",
    )

    @model_validator(mode="after")
    def _some_are_trained_on(self) -> "FilterCaptions":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction and test_fraction leave no captions to train on")
        return self

    def preview(self, root: Path, variant: str | None) -> list[str]:
        path = _require_source(resolve(self.source, root))
        return [f"captions: {path} ({path.stat().st_size:,} bytes)"]


def filter_captions(config: FilterCaptions, run: StageRun) -> None:
    """Write `captions.parquet` (id, caption, tokens, split) and `rejected.parquet` (row, text, reason) into `run.out`.

    An id is the row's number in the source, from 0; `tokens` has start and end included. Memory does not grow with the
    source. Splits are by a keyed hash of the caption's text, so equal captions never lie in two splits; the first
    captions of different text go to training, validation and test in turn, so that no split of a small file is empty.

    Raises:
        InputError: the source is missing, a folder, empty, or no text in UTF-8.
        ConfigError: `fix_text` without ftfy.
    """
    source = _require_source(run.source(config.source))
    splitter = Splitter(config.validation_fraction, config.test_fraction, config.seed)
    rows = undecoded = 0
    reasons: Counter[str] = Counter()
    with (
        _TableWriter(run.out / CAPTIONS, _KEPT_COLUMNS, _ROW_GROUP) as kept,
        _TableWriter(run.out / REJECTED, _REJECTED_COLUMNS, _REJECTED_ROW_GROUP) as rejected,
    ):
        read = read_rows(source, config.limit)
        for row, caption, tokens, reason in _judged(
            config, run.progress.each(read, unit="caption"), _workers(config, source)
        ):
            rows += 1
            undecoded += "\ufffd" in caption
            if reason:
                rejected.write((row, caption, reason))
                reasons[_kind(reason)] += 1
            else:
                kept.write((row, caption, tokens, splitter(caption)))
    run.count(rows=rows, kept=kept.rows, rejected=rejected.rows, **splitter.counts)
    run.figure(kept_share=kept.rows / rows if rows else None)
    if undecoded:
        run.figure(captions_not_utf8=undecoded)
        run.progress.log(f"{undecoded:,} of {rows:,} captions hold bytes that are not UTF-8 (now U+FFFD)")
    if abs(rows - CC12M_ROWS) <= 0.01 * CC12M_ROWS:
        run.figure(kept_beyond_the_papers=kept.rows - PAPER_KEPT)
        run.progress.log(f"kept {kept.rows:,} captions, {kept.rows - PAPER_KEPT:+,} to the paper's {PAPER_KEPT:,}")
    run.table("rejected", [{"reason": reason, "rows": count} for reason, count in sorted(reasons.items())])
    total = pq.read_metadata(run.out / CAPTIONS).num_rows + pq.read_metadata(run.out / REJECTED).num_rows
    run.check("counts_add_up", total == rows, f"{rows} rows were read, but {total} written")
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    run.check("captions_kept", kept.rows > 0, f"all {rows} rows of {config.source} were rejected: {why}")


def read_captions_table(folder: Path) -> pd.DataFrame:
    """The kept captions of a filter-captions output: id (int64), caption, tokens, split; in the order of ids."""
    return _open_captions(folder).read().to_pandas()


def caption_shards(
    folder: Path, shards: int, per_shard: int, per_split: Mapping[str, int] | None = None
) -> Iterator[pd.DataFrame]:
    """The first `shards * per_shard` kept captions, `per_shard` at a time; the last shard may be shorter, or missing.

    Args:
        per_split: of these splits at most so many captions, the first ones (splits not named: any number).
    """
    left = dict(per_split or {})
    held: list[pd.DataFrame] = []
    for batch in _open_captions(folder).iter_batches():
        part = batch.to_pandas()
        for split, most in left.items():
            mine = part["split"] == split
            part = part[~mine | (mine.cumsum() <= most)]
            left[split] = most - int((part["split"] == split).sum())
        held.append(part)
        while sum(map(len, held)) >= per_shard:
            whole = pd.concat(held, ignore_index=True)
            yield whole.head(per_shard)
            held = [whole.iloc[per_shard:]]
            shards -= 1
            if not shards:
                return
    rest = pd.concat(held, ignore_index=True) if held else pd.DataFrame()
    if len(rest):
        yield rest


def count_captions(folder: Path) -> dict[str, int]:
    """How many captions each split has."""
    counts = _open_captions(folder).read(columns=["split"]).column("split").value_counts().to_pylist()
    return {entry["values"]: entry["counts"] for entry in counts}


@dataclass(frozen=True)
class CaptionRow:
    """One line of a caption file, or why it holds no caption."""

    row: int
    text: str
    fault: str = ""


def read_rows(path: Path, limit: int | None = None) -> Iterator[CaptionRow]:
    """The lines of a TSV, one at a time; bytes that are not UTF-8 become U+FFFD.

    Only `\\n` ends a line and only the first tab separates: captions may hold quotes, tabs, U+2028 and bare CRs, which
    CSV readers trip over (pandas' default loses 3.4 % of real rows).

    Raises:
        InputError: the file is empty.
    """
    with path.open(encoding="utf-8", errors="replace", newline="\n") as f:
        row = -1
        while limit is None or row + 1 < limit:
            line = f.readline(_LINE_LIMIT)
            if not line:
                break
            row += 1
            if not line.endswith("\n") and len(line) == _LINE_LIMIT:
                while (rest := f.readline(_LINE_LIMIT)) and not rest.endswith("\n"):
                    pass
                yield CaptionRow(row, line[:200], f"line of over {_LINE_LIMIT:,} characters")
                continue
            line = line.removesuffix("\n").removesuffix("\r")  # the CR of a Windows line end is no part of a caption
            _, tab, caption = line.partition("\t")
            if not tab:
                yield CaptionRow(row, line, "no tab between URL and caption")
            elif not caption.strip():
                yield CaptionRow(row, caption, "empty caption")
            else:
                yield CaptionRow(row, caption)
        if row < 0:
            raise InputError(f"{path} is empty: expected lines of url<TAB>caption")


def clean_caption(text: str) -> str:
    """HTML entities undone (also those escaped twice) and white space collapsed."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


@dataclass
class Splitter:
    """Which split a caption belongs to: by its text alone, whatever file or order it comes in.

    But for the first texts: while a split that is wanted is still empty, the next new text goes to it.
    """

    validation_fraction: float
    test_fraction: float
    seed: int
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    _forced: dict[bytes, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = {"train": 1.0, "validation": self.validation_fraction, "test": self.test_fraction}
        self._empty = [split for split in SPLITS if wanted[split] > 0]

    def __call__(self, caption: str) -> str:
        digest = hashlib.blake2b(caption.encode(), digest_size=8, key=str(self.seed).encode()).digest()
        split = self._forced.get(digest) or self._split(digest)
        self.counts[split] += 1
        return split

    def _split(self, digest: bytes) -> str:
        if self._empty:
            self._forced[digest] = self._empty[0]
            return self._empty.pop(0)
        share = int.from_bytes(digest, "big") / 2**64
        if share < self.test_fraction:
            return "test"
        return "validation" if share < self.test_fraction + self.validation_fraction else "train"


def _judged(config: FilterCaptions, rows: Iterator[CaptionRow], workers: int) -> Iterator[tuple[int, str, int, str]]:
    """(row, text, tokens, why it is rejected) in the order of rows, whoever counts."""
    uncounted = 0 if config.count_special_tokens else START_AND_END
    seen = SeenTexts() if config.drop_duplicates else None
    for batch, counts in counted_batches(_batches(config, rows), lambda batch: batch[1], workers):
        judged = []
        for row, text, tokens in zip(*batch, counts):
            reason = row.fault or ("" if text else "empty caption")
            if not reason and tokens - uncounted > config.max_tokens:
                reason = f"{tokens - uncounted} tokens"
            judged.append((row.row, row.text if row.fault else text, tokens, reason))
        yield from judged if seen is None else _first_ones(judged, seen)


def _batches(config: FilterCaptions, rows: Iterator[CaptionRow]) -> Iterator[tuple[list[CaptionRow], list[str]]]:
    """Rows, with the texts to be counted: none where there is no caption."""
    mend = _mender() if config.fix_text else str
    clean = clean_caption if config.clean_text else str
    while batch := list(islice(rows, _BATCH)):
        yield batch, ["" if row.fault else clean(mend(row.text)) for row in batch]


def _mender() -> Callable[[str], str]:
    try:
        from ftfy import fix_text
    except ImportError:
        raise ConfigError("filter-captions.fix_text: ftfy is not installed: pip install 'm2m[text]'") from None
    return fix_text


def _first_ones(judged: list[tuple[int, str, int, str]], seen: SeenTexts) -> Iterator[tuple[int, str, int, str]]:
    new = iter(seen.new([text for _, text, _, reason in judged if not reason]))
    for row, text, tokens, reason in judged:
        yield row, text, tokens, reason or ("" if next(new) else "duplicate")


def _workers(config: FilterCaptions, source: Path) -> int:
    if config.workers is not None:
        return config.workers
    return len(os.sched_getaffinity(0)) if source.stat().st_size > _SMALL else 0


def _kind(reason: str) -> str:
    return "too many tokens" if reason.endswith(" tokens") else reason


def _require_source(path: Path) -> Path:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"filter-captions.source: {path} {what}; expected a TSV file of url<TAB>caption")
    if path.stat().st_size == 0:
        raise InputError(f"filter-captions.source: {path} is empty; expected lines of url<TAB>caption")
    with path.open("rb") as f:
        start = f.read(4)
    for mark, (what, way_out) in _NOT_UTF8.items():
        if start.startswith(mark):
            raise InputError(f"filter-captions.source: {path} is {what}, not UTF-8 text: {way_out}")
    return path


def _open_captions(folder: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(folder / CAPTIONS)
    except (OSError, pa.ArrowInvalid) as error:
        raise ArtifactError(f"{folder / CAPTIONS} can't be read ({error}); run filter-captions again") from None


class _TableWriter:
    """Parquet in row groups of a fixed size, so that neither memory nor bytes depend on how rows arrive."""

    def __init__(self, path: Path, columns: pa.Schema, row_group: int) -> None:
        self._path, self._columns, self._row_group = path, columns, row_group
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._rows: list[tuple[Any, ...]] = []
        self.rows = 0

    def __enter__(self) -> "_TableWriter":
        self._writer = pq.ParquetWriter(self._temporary, self._columns, compression="zstd")
        return self

    def write(self, row: tuple[Any, ...]) -> None:
        self._rows.append(row)
        self.rows += 1
        if len(self._rows) == self._row_group:
            self._flush()

    def _flush(self) -> None:
        arrays = [pa.array(values, kind) for values, kind in zip(zip(*self._rows), self._columns.types)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._columns))
        self._rows = []

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        try:
            if failed is None:
                if self._rows:
                    self._flush()
                self._writer.close()
        except BaseException:
            self._discard()
            raise
        if failed is not None:
            self._discard()
            return
        self._temporary.replace(self._path)
        sync_folder(self._path.parent)

    def _discard(self) -> None:
        """Leave nothing half-written; closing writes, which a full disk refuses again."""
        with contextlib.suppress(OSError):
            self._writer.close()
        self._temporary.unlink(missing_ok=True)
