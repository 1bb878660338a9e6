"""M2M's tiny starting weights: the sets they learn from, and that the shipped ones are what a stage can start from."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from m2m.arguments import EXIT_BAD_INPUT
from m2m.errors import ArtifactError
from m2m.models.text_to_image import load_ddim
from m2m.tiny import WEIGHTS, many_to_many
from m2m.tiny.__main__ import main
from m2m.tiny.export import export
from m2m.tiny.many_to_many import IMAGES_PER_SET, draw_set
from m2m.tiny.seen_through_noise import TIMESTEPS, seen_through_noise
from m2m.training import checkpoints
from m2m.training.checkpoints import Checkpoint
from m2m.training.starting import continued_unet


def test_a_set_is_drawn_from_its_generator_alone():
    first, again, other = (draw_set(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (IMAGES_PER_SET, 64, 64, 3) and first.dtype == np.uint8
    assert (first == again).all() and not (first == other).all()


@pytest.mark.parametrize("variant, width", [("self", None), ("dino", 96)])
def test_the_shipped_weights_are_a_start_for_pretraining(variant, width):
    folder = WEIGHTS / f"m2m-{variant}"
    unet = continued_unet(folder, variant, width, {})
    assert all(torch.isfinite(weight).all() and weight.dtype == torch.float32 for weight in unet.state_dict().values())
    assert json.loads((folder / "made_by.json").read_text())["command"].startswith(f"python -m m2m.tiny m2m {variant}")


def test_an_unfinished_training_ships_its_averages_of_its_newest_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(many_to_many, "OUTPUTS", tmp_path)
    with pytest.raises(ArtifactError, match="no whole checkpoint"):
        export("m2m-self-2", tmp_path / "shipped")
    average = continued_unet(WEIGHTS / "m2m-self", "self", None, {}).state_dict()
    nothing = {name: torch.zeros_like(weight) for name, weight in average.items()}
    for step, tensors in ((100, nothing), (200, average)):
        parts = {"unet": nothing, "average": tensors}
        checkpoints.save(tmp_path / "m2m-self-2" / "checkpoints", Checkpoint(step, parts, "the log\n", "self-30-2"), 2)
    load_ddim(WEIGHTS / "stable-diffusion", None, "v_prediction").save_pretrained(tmp_path / "m2m-self-2" / "scheduler")
    folder = export("m2m-self-2", tmp_path / "shipped")
    assert load_ddim(folder).config["prediction_type"] == "v_prediction"
    shipped = continued_unet(folder, "self", None, {}).state_dict()
    assert all(torch.equal(shipped[name], average[name]) for name in average)
    assert (folder / "training_log.jsonl").read_text() == "the log\n"
    told = json.loads((folder / "made_by.json").read_text())["command"]
    assert told == "python -m m2m.tiny m2m self --steps 200 --sets 30 --seed 2"


@pytest.mark.parametrize(
    "variant, overrides",
    [
        ("self", ["clean_timestep=null", "timesteps=set", "dropped_context=zeroed"]),
        ("self", ["context_noise=200", "rollout_share=0.5", "rollout_steps=2"]),
        ("dino", ["prediction_type=epsilon"]),
    ],
)
def test_a_training_with_other_settings_is_shipped_under_its_name(variant, overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(many_to_many, "OUTPUTS", tmp_path / "models")
    out = tmp_path / "shipped"
    for steps in (1, 2):  # the second goes on, from sets that are kept
        many_to_many.train_many_to_many(variant, out, steps, 24, name="other", overrides=overrides)
    shipped = out / f"m2m-{variant}-other"
    config = json.loads((shipped / "unet" / "config.json").read_text())
    own = {"clean_timestep": None, "dropped_context": "zeroed"} if "timesteps=set" in overrides else {}
    assert {key: config[key] for key in own} == own
    predicted = "epsilon" if variant == "dino" else "v_prediction"
    assert load_ddim(shipped).config["prediction_type"] == predicted
    told = json.loads((shipped / "made_by.json").read_text())["command"]
    assert (
        told
        == f"python -m m2m.tiny m2m {variant} --steps 2 --sets 24 --seed 0 --name other --set {' '.join(overrides)}"
    )
    assert len((shipped / "training_log.jsonl").read_text().splitlines()) == 2
    assert len(list((tmp_path / "models" / "sets").iterdir())) == 1
    again = export(f"m2m-{variant}-other", tmp_path / "again")
    assert json.loads((again / "unet" / "config.json").read_text())["dropped_context"] == config["dropped_context"]


def test_a_wrong_setting_is_named(capsys):
    assert main(["m2m", "self", "--steps", "1", "--set", "timestep=set"]) == EXIT_BAD_INPUT
    assert "timestep" in (said := capsys.readouterr().err) and "Did you mean timesteps?" in said


@pytest.mark.parametrize("name", ["tiny-self", "tiny-dino"])
def test_a_model_sees_more_through_less_noise_and_more_with_images_before(name):
    after_4, after_0 = (dict(zip(TIMESTEPS, errors)) for errors in seen_through_noise(Path(name), sets=24).values())
    for errors in (after_4, after_0):
        assert sorted(errors.values(), reverse=True) == [errors[timestep] for timestep in TIMESTEPS]
        assert 0 < errors[250] < 0.1
    assert all(after_4[timestep] < after_0[timestep] for timestep in (999, 950, 900, 750))
    assert after_4[999] < 1  # the mean of all images has 1
