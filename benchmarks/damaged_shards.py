"""Bit flips, truncations and deletions in a folder of shards: found, named, and mended by remaking only what is broken.

The tiny models make shards of one small set; rounds of damage, each in other files, are found and repaired until so
many places were hit. `python -m benchmarks.damaged_shards [--places 200]`
"""

import argparse
import json
import os
import random
import tempfile
from pathlib import Path

from benchmarks.killed_generation import SETTINGS, tree
from m2m.config import load_profile, project_root
from m2m.data.shard_repair import find_damage, repair
from m2m.data.shards import ShardPaths
from m2m.generation.image_sets import SetMaker
from m2m.progress import Progress
from m2m.stage_run import run_stage
from m2m.stages import STAGES

SHARDS, A_ROUND = 24, 20
QUIET, STAGE = Progress(quiet=True), STAGES["generate-sets"]


def damage(path: Path, chance: random.Random) -> None:
    """One bit flipped, the end cut off, or the file gone."""
    content = bytearray(path.read_bytes())
    match chance.choice(["flip", "flip", "cut", "delete"]):
        case "flip":
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(content)
        case "cut":
            path.write_bytes(content[: chance.randrange(len(content))])
        case "delete":
            path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", type=int, default=200)
    args = parser.parse_args()
    chance, made = random.Random(0), []
    latents = SetMaker.latents
    SetMaker.latents = lambda maker, i, caption: made.append(i) or latents(maker, i, caption)  # type: ignore[method-assign]
    found = named = places = needless = differing = 0
    with tempfile.TemporaryDirectory() as name:
        settings = json.loads(json.dumps(SETTINGS))
        for section, key in (("filter-captions", "source"), ("generate-sets", "text_to_image")):
            settings[section][key] = str(project_root() / settings[section][key])
        settings["filter-captions"]["limit"] = 3 * SHARDS
        settings["generate-sets"] |= {"shards": SHARDS, "sets_per_shard": 1, "images_per_set": 1}
        (Path(name) / "small.yaml").write_text(json.dumps(settings))  # JSON is YAML
        os.environ["M2M_OUTPUTS"] = str(Path(name) / "outputs")
        profile = load_profile(Path(name) / "small.yaml")
        run_stage(STAGES["filter-captions"], profile, progress=QUIET)
        out = run_stage(STAGE, profile, progress=QUIET).folder
        whole, ids = tree(out), dict(enumerate(made))
        while places < args.places:
            hit = {}
            for number in chance.sample(range(SHARDS), min(A_ROUND, args.places - places)):
                hit[number] = ShardPaths(out, number).path(chance.choice(["tar", "tar", "idx", "json"]))
                damage(hit[number], chance)
            places += len(hit)
            told = find_damage(out).shards
            found += len(set(told) & set(hit))
            named += sum(any(path.name in fault for fault in told.get(number, ())) for number, path in hit.items())
            made.clear()
            repair(STAGE, profile, out, progress=QUIET)
            broken = {
                ids[number] for number, path in hit.items() if path.suffix != ".idx"
            }  # an index needs its tar alone
            needless += len(set(made) - broken) + len(set(told) - set(hit)) + len(made) - len(set(made))
            now = tree(out)
            differing += sum(now.get(path) != content for path, content in whole.items()) + len(set(now) - set(whole))
    print(
        f"{places} places: {found} found, {named} named; repair made {needless} sets needlessly, and {differing} files "
        "differ afterwards"
    )
    figures = {"places": places, "found": found, "named": named, "needless": needless, "differing": differing}
    ok = found == named == places and not needless and not differing
    reach = {"found": f"{places}", "named": f"{places}", "needless": "0", "differing": "0"}
    print(json.dumps({"name": "damaged_shards", "figures": figures, "reach": reach, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
