"""The caption filter: exact, nothing lost, no row out of place, splits that hold."""

import errno
import gzip
import hashlib
import html
import importlib.util
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from m2m.config import Profile
from m2m.data import captions, tokens
from m2m.data.captions import (
    SPLITS,
    FilterCaptions,
    caption_shards,
    clean_caption,
    count_captions,
    filter_captions,
    read_captions_table,
)
from m2m.data.duplicates import SeenTexts
from m2m.data.tokens import VOCABULARY
from m2m.errors import CheckFailed, ConfigError, InputError
from m2m.progress import Progress
from m2m.stage_run import StageRun, run_stage
from m2m.stages import STAGES

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "captions"
STAGE = STAGES["filter-captions"]
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")


def filtered(tmp_path: Path, source: Path | bytes, **config) -> tuple[pd.DataFrame, pd.DataFrame, StageRun]:
    """Run the stage's function alone, into a new folder."""
    if isinstance(source, bytes):
        (tmp_path / "source.tsv").write_bytes(source)
        source = tmp_path / "source.tsv"
    run = run_filter(tmp_path, FilterCaptions(source=source, **config))
    out = tmp_path / "out"
    return read_captions_table(out), pd.read_parquet(out / "rejected.parquet"), run


def run_filter(tmp_path: Path, config: FilterCaptions) -> StageRun:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    run = StageRun(STAGE, Profile(Path("p.yaml"), {}, tmp_path, root=tmp_path), out, {}, "", Progress(quiet=True))
    filter_captions(config, run)
    return run


@real
def test_real_alt_texts(tmp_path):
    kept, rejected, run = filtered(tmp_path, REAL / "alt_texts_10k.tsv")
    assert run.counts["rows"] == 9959 == len(kept) + len(rejected)
    assert rejected["reason"].str.endswith(" tokens").sum() == len(rejected) == 57
    tokenizer = CLIPTokenizer.from_pretrained(VOCABULARY)
    sample = kept.iloc[::20]
    assert [len(ids) for ids in tokenizer(sample["caption"].tolist())["input_ids"]] == sample["tokens"].tolist()
    lines = (REAL / "alt_texts_10k.tsv").read_bytes().split(b"\n")
    assert all(lines[i].split(b"\t", 1)[1].decode() == caption for i, caption in zip(kept["id"], kept["caption"]))
    assert kept["id"].tolist() == sorted(set(kept["id"]))


@real
def test_rows_that_break_csv_readers(tmp_path):
    kept, rejected, _ = filtered(tmp_path, REAL / "hostile.tsv")
    texts = kept.set_index("id")["caption"].to_dict()
    assert len(texts) == 10
    assert rejected.to_dict("records") == [{"row": 4, "text": "", "reason": "empty caption"}]
    assert texts[0] == '"A quoted start' and texts[3] == "a\ttab" and texts[5] == "N/A" and texts[6] == "null"
    assert texts[7] == "caf\ufffd latin1" and texts[8] == "line\u2028sep \x85 nel" and texts[9] == "cr\rinside"


CELLS = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=30, deadline=None)
@given(lines=st.lists(st.one_of(CELLS, st.tuples(CELLS, CELLS).map("\t".join)), min_size=1, max_size=20))
def test_no_row_is_lost_or_merged(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("fuzz")
    kept, rejected, run = filtered(folder, ("\n".join(lines) + "\n").encode())
    assert run.counts["rows"] == len(lines)
    assert sorted([*kept["id"], *rejected["row"]]) == list(range(len(lines)))
    assert run.summary["checks"]["counts_add_up"] == ""
    for i, caption in zip(kept["id"], kept["caption"]):
        assert lines[i].removesuffix("\r").split("\t", 1)[1] == caption


def test_rejected_rows_keep_their_reason(tmp_path):
    source = b"http://u\n" + b"u\t" + b"word " * 76 + b"\nu\t  \nu\tkept\r\nu\t" + b"word " * 75
    kept, rejected, run = filtered(tmp_path, source)
    assert rejected["reason"].tolist() == ["no tab between URL and caption", "78 tokens", "empty caption"]
    assert rejected["text"].tolist()[0] == "http://u"
    assert kept["caption"].tolist() == ["kept", "word " * 75] and kept["tokens"].tolist() == [3, 77]
    assert {row["reason"]: row["rows"] for row in run.summary["tables"]["rejected"]}["too many tokens"] == 1


def test_special_tokens_and_cleaning_are_options(tmp_path):
    source = b"u\t" + b"word " * 76 + b"\nu\tsalt &amp;amp;\t pepper\n"
    kept, _, _ = filtered(tmp_path, source, count_special_tokens=False, clean_text=True)
    assert kept["caption"].tolist() == ["word " * 75 + "word", "salt & pepper"]
    assert kept["tokens"].tolist() == [78, 5]


def test_duplicates_are_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "_BATCH", 3)
    source = b"".join(b"u\t%s\n" % text for text in (b"a", b"b", b"a", b"A", b" ", b"b", b"c", b"a", b"c", b"d"))
    kept, rejected, run = filtered(tmp_path, source, drop_duplicates=True)
    assert kept["id"].tolist() == [0, 1, 3, 6, 9]
    assert rejected.set_index("row")["reason"].to_dict() == {4: "empty caption"} | dict.fromkeys(
        (2, 5, 7, 8), "duplicate"
    )
    assert {"reason": "duplicate", "rows": 4} in run.summary["tables"]["rejected"]
    kept, _, _ = filtered(tmp_path, b"u\tsalt &amp; pepper\nu\tsalt  & pepper\n", drop_duplicates=True, clean_text=True)
    assert kept["id"].tolist() == [0]


@settings(max_examples=40, deadline=None)
@given(batches=st.lists(st.lists(st.sampled_from("abcdefghij"), max_size=8), max_size=12))
def test_a_text_is_new_once(batches):
    seen, known = SeenTexts(), set()
    for batch in batches:
        expected = [not (text in known or known.add(text)) for text in batch]
        assert seen.new(batch) == expected
    assert len(seen) == len(known)


def test_all_cores_give_the_bytes_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "_BATCH", 50)
    source = "".join(f"u{i}\tcaption {i % 170}{' word' * (i % 90)}\n" for i in range(900)).encode()
    found = []
    for workers in (0, 2):
        filtered(tmp_path, source, workers=workers, drop_duplicates=True, clean_text=True)
        found.append([(tmp_path / "out" / name).read_bytes() for name in ("captions.parquet", "rejected.parquet")])
    assert found[0] == found[1]


def test_the_distance_to_the_paper_is_said_of_cc12m_alone(tmp_path, monkeypatch):
    source = b"u\ta\nu\tb\nu\t \n"
    assert "kept_beyond_the_papers" not in filtered(tmp_path, source)[2].summary["figures"]
    monkeypatch.setattr(captions, "CC12M_ROWS", 3)
    assert filtered(tmp_path, source)[2].summary["figures"]["kept_beyond_the_papers"] == 2 - 12_237_187


def test_a_full_disk_leaves_no_table(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        filtered(tmp_path, b"u\ta\nu\tb\nbroken\n")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_may_not_grow_leaves_nothing_half_written(tmp_path):
    """A real limit of the system's, met by the whole command in a process of its own."""
    lines = (f"u\t{i} {hashlib.sha256(str(i).encode()).hexdigest()[:40]}\n" for i in range(3000))
    (tmp_path / "c.tsv").write_text("".join(lines))
    (tmp_path / "small.yaml").write_text(json.dumps({"filter-captions": {"source": str(tmp_path / "c.tsv")}}))
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
        "from m2m.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", limited, "filter-captions", "--config", str(tmp_path / "small.yaml")],
        env={**os.environ, "M2M_OUTPUTS": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "File too large" in done.stderr
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [name for name in left if name.endswith((captions.CAPTIONS, ".tmp", "manifest.json"))]


@pytest.mark.parametrize(
    "content, why",
    [
        ("u\ta cat\n".encode("utf-16"), "is UTF-16, not UTF-8 text: convert it"),
        (gzip.compress(b"u\ta cat\n"), r"compressed \(gzip\).*unpack it"),
        (b"PAR1....", "is parquet"),
    ],
)
def test_a_source_that_is_no_utf8_text_is_refused(tmp_path, content, why):
    with pytest.raises(InputError, match=rf"filter-captions\.source: .*source\.tsv.*{why}"):
        filtered(tmp_path, content)


def test_captions_in_another_encoding_are_counted(tmp_path):
    source = b"u\t" + "café".encode("latin-1") + b"\nu\tplain\n"
    kept, _, run = filtered(tmp_path, source)
    assert kept["caption"].tolist() == ["caf\ufffd", "plain"] and run.summary["figures"]["captions_not_utf8"] == 1
    assert "captions_not_utf8" not in filtered(tmp_path, b"u\tplain\n")[2].summary["figures"]


def test_wrongly_decoded_text_is_mended_by_ftfy(tmp_path):
    source = "u\tcafÃ© &amp; tea\n".encode()
    if importlib.util.find_spec("ftfy") is None:
        with pytest.raises(ConfigError, match=r"pip install 'm2m\[text\]'"):
            filtered(tmp_path, source, fix_text=True)
    else:
        kept, _, _ = filtered(tmp_path, source, fix_text=True, clean_text=True)
        assert kept["caption"].tolist() == ["café & tea"]


@given(text=st.text(st.characters(exclude_characters="&")))
def test_cleaning_undoes_html_even_twice_escaped(text):
    assert clean_caption(html.escape(html.escape(text))) == " ".join(text.split())


def test_equal_captions_never_lie_in_two_splits(tmp_path):
    source = "".join(f"u{i}\tcaption {i % 300}\n" for i in range(1500)).encode()
    kept, _, run = filtered(tmp_path, source, validation_fraction=0.1, test_fraction=0.2)
    assert len(set(zip(kept["caption"], kept["split"]))) == 300
    assert run.counts["test"] / 1500 == pytest.approx(0.2, abs=0.06)
    assert run.counts["validation"] / 1500 == pytest.approx(0.1, abs=0.06)
    assert run.counts["train"] == kept["split"].tolist().count("train")


def test_a_captions_split_does_not_depend_on_the_file(tmp_path):
    lines = [f"u\tcaption {i}\n".encode() for i in range(400)]
    one, _, _ = filtered(tmp_path, b"".join(lines), validation_fraction=0.2, test_fraction=0.2)
    two, _, _ = filtered(tmp_path, b"".join(lines[:3] + lines[:2:-1]), validation_fraction=0.2, test_fraction=0.2)
    assert one.set_index("caption")["split"].to_dict() == two.set_index("caption")["split"].to_dict()


def test_a_small_file_fills_every_split(tmp_path):
    kept, _, _ = filtered(tmp_path, b"u\ta\nu\ta\nu\tb\nu\tc\nu\td\n", validation_fraction=1e-6, test_fraction=1e-6)
    assert kept["split"].tolist() == ["train", "train", "validation", "test", "train"]
    kept, _, _ = filtered(tmp_path, b"u\ta\nu\tb\nu\tc\n", validation_fraction=0, test_fraction=0)
    assert set(kept["split"]) == {"train"}


def test_shards_of_captions_are_the_first_of_each_split(tmp_path):
    source = "".join(f"u\tcaption {i}\n" for i in range(500)).encode()
    kept, _, run = filtered(tmp_path, source, validation_fraction=0.2, test_fraction=0.2)
    assert count_captions(tmp_path / "out") == {split: run.counts[split] for split in SPLITS}
    shards = list(caption_shards(tmp_path / "out", 6, 10, {"validation": 5, "test": 3}))
    expected = pd.concat([kept[kept["split"] == s].head(n) for s, n in [("train", 60), ("validation", 5), ("test", 3)]])
    assert [len(shard) for shard in shards] == [10] * 6
    assert [i for shard in shards for i in shard["id"]] == sorted(expected["id"])[:60]
    assert [len(shard) for shard in caption_shards(tmp_path / "out", 9, 60)] == [60] * 8 + [20]
    assert next(caption_shards(tmp_path / "out", 1, 7))["id"].tolist() == list(range(7))


def test_memory_does_not_grow_with_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "_ROW_GROUP", 500)
    monkeypatch.setattr(captions, "_BATCH", 100)
    monkeypatch.setattr(tokens, "_MEMO_LIMIT", 100)  # full from the start, as after the first of many million rows
    (tmp_path / "big.tsv").write_bytes(b"u\t" + b"\nu\t".join(b"one red square, %d" % i for i in range(12_000)))
    peaks = []
    tracemalloc.start()
    try:
        for limit in (1000, 2000, 12_000):  # the first one loads the vocabulary
            tracemalloc.reset_peak()
            run_filter(tmp_path, FilterCaptions(source=tmp_path / "big.tsv", limit=limit))
            peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert peaks[2] < 1.2 * peaks[1]
    assert pq.ParquetFile(tmp_path / "out" / "captions.parquet").num_row_groups == 24


def test_the_same_source_gives_the_same_bytes(tmp_path):
    found = []
    for _ in range(2):
        filtered(tmp_path, b"u\ta\nu\tb\nu\nu\tc\n")
        found.append([(tmp_path / "out" / name).read_bytes() for name in ("captions.parquet", "rejected.parquet")])
    assert found[0] == found[1]


def test_a_file_without_line_ends_is_one_rejected_row(tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "_LINE_LIMIT", 1000)
    kept, rejected, _ = filtered(tmp_path, b"u\t" + b"x" * 5000 + b"\nu\tfine\n")
    assert rejected["reason"].tolist() == ["line of over 1,000 characters"] and kept["id"].tolist() == [1]


def profile(tmp_path: Path, **section) -> Profile:
    return Profile(Path("configs/p.yaml"), {"filter-captions": section}, tmp_path / "outputs", root=tmp_path)


@pytest.mark.parametrize("content", [None, b""])
def test_a_source_that_holds_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / "c.tsv").write_bytes(content)
    with pytest.raises(InputError, match=r"c\.tsv"):
        run_stage(STAGE, profile(tmp_path, source="c.tsv"), progress=Progress(quiet=True))
    with pytest.raises(InputError, match=r"filter-captions\.source"):
        FilterCaptions(source=Path("c.tsv")).preview(tmp_path, None)


def test_the_stage_leaves_a_whole_output_and_no_more(tmp_path):
    (tmp_path / "c.tsv").write_bytes(b"u\ta cat\nu\ta dog\nu\ta cow\nbroken\n")
    outcome = run_stage(STAGE, profile(tmp_path, source="c.tsv"), progress=Progress(quiet=True))
    assert outcome.manifest and [f.path for f in outcome.manifest.files] == [
        "captions.parquet",
        "rejected.parquet",
        "summary.json",
    ]
    assert outcome.manifest.counts["kept"] == 3


def test_when_nothing_is_left_the_check_says_why(tmp_path):
    (tmp_path / "c.csv").write_bytes(b"url,caption\nu,a cat\n")
    with pytest.raises(CheckFailed, match=r"all 2 rows of c\.csv were rejected: 2 no tab"):
        run_stage(STAGE, profile(tmp_path, source="c.csv"), progress=Progress(quiet=True))


def test_fractions_that_leave_no_training_captions_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="validation_fraction"):
        run_stage(STAGE, profile(tmp_path, source="c", validation_fraction=0.6, test_fraction=0.5))
