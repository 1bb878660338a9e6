"""The shipped models: they load with the ordinary classes and do what they are for, within wide bounds."""

import json

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizerFast, Dinov2Model  # type: ignore

from m2m.tiny import WEIGHTS
from m2m.tiny.classifier import Classifier
from m2m.tiny.measure import asked_and_read, reconstruct, sample_images
from m2m.tiny.world import ATTRIBUTES, draw, sample_scene


@pytest.fixture(scope="module")
def classifier():
    return Classifier.from_pretrained(WEIGHTS / "classifier")


@pytest.fixture(scope="module")
def pipeline():
    found = StableDiffusionPipeline.from_pretrained(WEIGHTS / "stable-diffusion", safety_checker=None)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def originals():
    """300 pictures and their labels."""
    rng = np.random.default_rng(7)
    scenes = [sample_scene(rng) for _ in range(300)]
    images = np.stack([draw(scene, rng) for scene in scenes])
    labels = np.array([scene.labels() for scene in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels


def test_the_classifier_reads_originals(classifier, originals):
    images, labels = originals
    assert ((classifier.predict(images) == labels).mean(0) >= 0.95).all()


def test_the_classifier_takes_bytes_floats_and_other_sizes(classifier, originals):
    images = originals[0][:20]
    with torch.no_grad():
        features = classifier.features(images)
        assert features.shape == (20, 32)
        torch.testing.assert_close(features, classifier.features(images / 255), atol=1e-5, rtol=1e-5)
        larger = torch.nn.functional.interpolate(images / 255, (128, 128), mode="nearest")
        assert (classifier.predict(larger) == classifier.predict(images)).mean() > 0.95
        assert {name: logits.shape[1] for name, logits in classifier.logits(images).items()} == {
            name: len(values) for name, values in ATTRIBUTES.items()
        }


def test_the_classifier_loads_strictly(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 3}))
    with pytest.raises(TypeError, match="depth"):
        Classifier.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "features": 16}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        Classifier.from_pretrained(tmp_path)


def test_attributes_survive_the_autoencoder(pipeline, classifier, originals):
    images, labels = originals
    read = classifier.predict(reconstruct(pipeline, images[:100] / 255))
    assert ((read == labels[:100]).mean(0) >= 0.95 * (classifier.predict(images[:100]) == labels[:100]).mean(0)).all()


def test_latents_have_unit_deviation(pipeline, originals):
    with torch.no_grad():
        latents = pipeline.vae.encode(originals[0][:100] / 127.5 - 1).latent_dist.mean
    assert latents.shape == (100, 16, 8, 8)
    assert float(latents.std()) * pipeline.vae.config["scaling_factor"] == pytest.approx(1, abs=0.05)


def test_samples_show_what_was_asked_for(pipeline, classifier):
    captions, images = sample_images(pipeline, 40, seed=1)
    assert images.shape == (40, 3, 64, 64)
    assert asked_and_read(classifier, captions, images)["mean"] >= 0.8  # by chance: 0.23


def test_clip_and_the_pipeline_share_a_text_tower_and_the_real_vocabulary(pipeline):
    tokenizer = CLIPTokenizerFast.from_pretrained(WEIGHTS / "clip")
    assert tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert pipeline.tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    clip = CLIPModel.from_pretrained(WEIGHTS / "clip", dtype=torch.float32).eval()
    tokens = tokenizer(["two red stars"], padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours = pipeline.text_encoder(tokens).last_hidden_state
        torch.testing.assert_close(ours, clip.text_model(tokens).last_hidden_state)
    assert clip.projection_dim == 64


def test_dino_gives_65_tokens(originals):
    model = Dinov2Model.from_pretrained(WEIGHTS / "dinov2", dtype=torch.float32).eval()
    with torch.no_grad():
        assert model(pixel_values=torch.zeros(2, 3, 64, 64)).last_hidden_state.shape == (2, 65, 96)
    assert json.loads((WEIGHTS / "dinov2" / "preprocessor_config.json").read_text())["size"] == {
        "height": 64,
        "width": 64,
    }


def test_weights_are_safetensors_of_half_precision_and_small():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert not {path.suffix for path in files} & {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
    assert sum(path.stat().st_size for path in files) < 60_000_000
    from safetensors import safe_open

    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
            assert kinds <= {"F16", "I64"}, path


def test_the_measured_figures_hold():
    found = json.loads((WEIGHTS / "measured.json").read_text())
    for name in ATTRIBUTES:
        assert found["originals_read"][name] >= 0.98
        assert found["reconstructions_read"][name] >= 0.95 * found["originals_read"][name]
        assert found["dino_linear_probe"][name] >= 0.9
    assert found["reconstructions_psnr"] >= 28
    assert found["samples_read"]["mean"] >= 0.9
