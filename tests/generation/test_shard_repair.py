"""Bit flips, truncations and deletions: every one found and named, and only what is broken made again."""

import random
import shutil
from pathlib import Path

import pytest

from benchmarks.damaged_shards import damage
from m2m.config import load_profile
from m2m.data.shard_repair import find_damage, repair
from m2m.data.shards import ShardPaths
from m2m.errors import ArtifactError
from m2m.generation.image_sets import SetMaker
from m2m.progress import Progress
from m2m.stage_run import run_stage
from m2m.stages import STAGES

QUIET = Progress(quiet=True)
STAGE = STAGES["generate-sets"]
PLACES = 200


@pytest.fixture
def made(make_profile, monkeypatch):
    """(profile, the whole output, ids of the sets that were made since)."""
    profile = load_profile(make_profile([f"caption {i}" for i in range(6)], shards=6, sets_per_shard=1))
    run_stage(STAGES["filter-captions"], profile, progress=QUIET)
    out = run_stage(STAGE, profile, progress=QUIET).folder
    again: list[int] = []
    latents = SetMaker.latents
    monkeypatch.setattr(SetMaker, "latents", lambda maker, i, caption: again.append(i) or latents(maker, i, caption))
    return profile, out, again


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_damage_anywhere_is_found_and_named(made):
    _, out, _ = made
    chance = random.Random(0)
    whole = tree(out)
    assert not find_damage(out)
    for _ in range(PLACES):
        number, ending = chance.randrange(6), chance.choice(["tar", "tar", "idx", "json"])
        path = ShardPaths(out, number).path(ending)
        damage(path, chance)
        found = find_damage(out)
        assert list(found.shards) == [number] and not found.others
        assert any(path.name in fault for fault in found.shards[number])
        path.write_bytes(whole[f"shards/{path.name}"])
    assert tree(out) == whole


@pytest.mark.parametrize("seed", range(3))
def test_only_what_is_broken_is_made_again(made, seed):
    profile, out, again = made
    chance, whole = random.Random(seed), tree(out)
    broken = chance.sample(range(6), 3)
    indices = {broken[0]}
    for number in broken:
        endings = ["idx"] if number in indices else chance.sample(["tar", "json", "idx"], 2)
        for ending in endings:
            damage(ShardPaths(out, number).path(ending), chance)
    other = chance.choice(["sets.parquet", "index.json", "contact_sheet.png", "summary.json"])
    damage(out / other, chance)
    found = repair(STAGE, profile, out, progress=QUIET)
    assert sorted(found.shards) == sorted(broken) and list(found.others) == [other]
    assert sorted(again) == sorted(set(broken) - indices)
    assert tree(out) == whole and not find_damage(out)


def test_a_lost_manifest_costs_no_shard(made):
    profile, out, again = made
    whole = tree(out)
    (out / "manifest.json").write_text("{")
    ShardPaths(out, 2).tar.write_bytes(b"")
    repair(STAGE, profile, out, progress=QUIET)
    assert again == [2] and tree(out) == whole


def test_what_is_in_the_making_stays_so(made):
    profile, out, again = made
    shutil.rmtree(out)
    partial = run_stage(STAGE, profile, shards=[1, 4], progress=QUIET).folder
    again.clear()
    ShardPaths(partial, 4).index.unlink()
    ShardPaths(partial, 1).record.unlink()
    found = repair(STAGE, profile, partial, progress=QUIET)
    assert sorted(found.shards) == [1, 4] and again == [1]
    assert not find_damage(partial) and not out.exists()


def test_repair_refuses_to_make_everything_anew(made):
    profile, out, again = made
    ShardPaths(out, 0).tar.unlink()
    before = tree(out)
    with pytest.raises(ArtifactError, match="made with other settings"):
        repair(STAGE, profile, out, overrides=["steps=3"], progress=QUIET)
    assert tree(out) == before and again == []
