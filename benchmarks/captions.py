"""Captions that nobody has seen before: counting their CLIP tokens, and the whole filter, against CLIPTokenizerFast.

It is called on lists. Also whether counts ever differ (captions and fuzzed strings), and the filter's memory as its
source grows.
`python -m benchmarks.captions [--captions N] [--fuzzed N] [--rows N]`
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from m2m.config import Profile
from m2m.data.captions import FilterCaptions, filter_captions
from m2m.data.tokens import VOCABULARY, TokenCounter
from m2m.progress import Progress
from m2m.stage_run import StageRun
from m2m.stages import STAGES

REAL = Path(__file__).parents[2] / "shared" / "data" / "captions" / "alt_texts_10k.tsv"
TINY = Path(__file__).parents[1] / "m2m" / "tiny" / "data" / "captions.tsv"
ODD = [*map(chr, range(32, 127)), *"\t\n\x0b\x0c\r\x1c\x1f\x00\x7f\x85\xa0İ𝅘𝅥\u0344Σß\u200b\u2028\ufeff😀中שּ\u0958"]


def invented(count: int, seed: int) -> list[str]:
    """New captions: real ones' words in new orders, every thirteenth word one that never was (a name, a number)."""
    source = REAL if REAL.is_file() else TINY
    chance = random.Random(seed)
    texts = [line.split("\t", 1)[1] for line in source.read_text(encoding="utf-8").split("\n") if "\t" in line]
    lengths, words = [len(text.split()) for text in texts], [word for text in texts for word in text.split()]

    def word() -> str:
        if chance.random() < 1 / 13:
            return "".join(chance.choices("abcdefghiklmnoprstuvw", k=chance.randint(3, 9))).capitalize()
        return chance.choice(words)

    return [" ".join(word() for _ in range(chance.choice(lengths))) for _ in range(count)]


def fuzzed(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    words = ["don't", "I'LL", "<PERSON>", "<|endoftext|>", "<|startoftext|>", "2021", "&amp;", "'S", "co-op", "!!!"]

    def one() -> str:
        if chance.random() < 0.5:
            return "".join(chance.choices(ODD, k=chance.randint(0, 120)))
        return " ".join(
            chance.choice(words) if chance.random() < 0.4 else "".join(chance.choices(ODD, k=chance.randint(1, 6)))
            for _ in range(chance.randint(1, 40))
        )

    return [one() for _ in range(count)]


def seconds_of_filter(captions: list[str], folder: Path) -> float:
    """CPU-seconds of the stage's function in this process: reading, counting, splits, both tables."""
    source = folder / "new.tsv"
    source.write_text("".join(f"http://u\t{caption}\n" for caption in captions), encoding="utf-8", newline="\n")
    profile = Profile(Path("p.yaml"), {}, folder, root=folder)
    run = StageRun(STAGES["filter-captions"], profile, folder, {}, "", Progress(quiet=True))
    started = time.process_time()
    filter_captions(FilterCaptions(source=source, workers=0), run)
    return time.process_time() - started


def peak_of_filter(rows: int, folder: Path) -> float:
    """MB of resident memory at the peak of the stage over so many rows, in a process of its own."""
    source = folder / f"{rows}.tsv"
    captions = invented(20_000, 7)
    with source.open("w", encoding="utf-8") as f:
        for first in range(0, rows, len(captions)):  # the row's number is a word that was never met
            f.writelines(f"http://u\t{first + i} {caption}\n" for i, caption in enumerate(captions))
    done = subprocess.run(
        [sys.executable, "-c", _FILTER, str(source), str(folder)], capture_output=True, text=True, check=True
    )
    source.unlink()
    return float(done.stdout.split()[-1])


_FILTER = """
import sys
from pathlib import Path
from m2m.config import Profile
from m2m.data.captions import FilterCaptions, filter_captions
from m2m.progress import Progress
from m2m.stage_run import StageRun
from m2m.stages import STAGES
source, folder = Path(sys.argv[1]), Path(sys.argv[2])
out = folder / "out"
out.mkdir(exist_ok=True)
profile = Profile(Path("p.yaml"), {}, folder, root=folder)
run = StageRun(STAGES["filter-captions"], profile, out, {}, "", Progress(quiet=True))
filter_captions(FilterCaptions(source=source, workers=0), run)
status = Path("/proc/self/status").read_text()  # getrusage's peak would count the parent's memory before the exec
print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--fuzzed", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the smaller source; the other has 5 times more")
    args = parser.parse_args()
    from transformers import CLIPTokenizer  # the fast one: transformers 5 has no other

    tokenizer, counter = CLIPTokenizer.from_pretrained(VOCABULARY), TokenCounter.for_clip()
    captions = invented(args.captions, 1)
    halves = captions[: args.captions // 2], captions[args.captions // 2 :]  # the memo has seen nothing of either

    def rate(count, batches) -> tuple[float, list[int]]:
        found, started = [], time.process_time()
        for batch in batches:
            found += count(batch)
        return sum(map(len, batches)) / (time.process_time() - started), found

    def reference(batch: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(batch)["input_ids"]]

    batches = [[half[i : i + 8192] for i in range(0, len(half), 8192)] for half in halves]
    own, own_counts = rate(counter.count, batches[0])
    theirs, their_counts = rate(reference, batches[0])
    own_again, more = rate(counter.count, batches[1])
    their_again, expected = rate(reference, batches[1])
    differences = sum(a != b for a, b in zip(own_counts + more, their_counts + expected))
    new = invented(args.captions, 3)
    with tempfile.TemporaryDirectory() as folder:
        filtering = len(new) / seconds_of_filter(new, Path(folder))
    odd = fuzzed(args.fuzzed, 2)
    fuzz_differences = sum(a != b for a, b in zip(counter.count(odd), reference(odd)))
    print(
        f"{own:,.0f} captions a CPU-second from an empty memo, {own_again:,.0f} after; "
        f"the whole filter {filtering:,.0f}; CLIPTokenizerFast {theirs:,.0f}, {their_again:,.0f}"
    )
    figures: dict[str, float] = {
        "captions_per_cpu_second": round(own_again),
        "clip_tokenizer_fast": round(their_again),
        "times_faster": round(own_again / their_again, 2),
        "times_faster_from_empty_memo": round(own / theirs, 2),
        "filter_captions_per_cpu_second": round(filtering),
        "filter_times_faster": round(filtering / theirs, 2),
        "captions": args.captions,
        "differences": differences,
        "fuzzed": args.fuzzed,
        "fuzzed_differences": fuzz_differences,
    }
    reach: dict[str, str] = {
        "times_faster": ">= 3",
        "filter_times_faster": ">= 3",
        "differences": "0",
        "fuzzed_differences": "0",
    }
    ok = own_again >= 3 * their_again and filtering >= 3 * theirs and differences == fuzz_differences == 0
    if args.rows:
        with tempfile.TemporaryDirectory() as folder:
            small, large = (peak_of_filter(args.rows * times, Path(folder)) for times in (1, 5))
        figures |= {"rows": args.rows, "peak_mb": round(small), "peak_mb_5_times_more": round(large)}
        reach |= {"peak_mb_5_times_more": "< 400 and within 10 % of peak_mb"}
        ok = ok and large < 400 and large < 1.1 * small
        print(f"peak memory of the filter: {small:.0f} MB for {args.rows:,} rows, {large:.0f} MB for 5 times more")
    print(json.dumps({"name": "captions", "figures": figures, "reach": reach, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
