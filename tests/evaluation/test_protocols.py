"""The reasoning inside the protocols, against simulations and independent computations."""

import hashlib
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.multimodal import CLIPScore
from transformers import CLIPModel, CLIPTokenizer

from m2m.config import Compute
from m2m.errors import InputError
from m2m.evaluation import encoders
from m2m.evaluation.agreement import corrected, ideal_agreement
from m2m.evaluation.consistency import asked_and_free
from m2m.evaluation.encoders import Clip, Reader, inception_weights
from m2m.evaluation.grids import write_grid
from m2m.evaluation.measures import clip_scores
from m2m.evaluation.protocol import at_size
from m2m.evaluation.views import view_angles
from m2m.tiny.world import ATTRIBUTES, Scene, describe

CPU = Compute(device="cpu", dtype="float32", threads=1)


@pytest.mark.parametrize(("prior", "values", "preceding"), [(0.5, 3, 1), (0.66, 5, 2), (0.3, 6, 3)])
def test_the_ideal_observer_is_what_simulated_sets_do(prior, values, preceding):
    drawn = np.random.default_rng(0)
    sets = 400_000
    free = drawn.integers(values, size=(sets, preceding + 1))
    shared = drawn.random(sets) < prior
    shown = np.where(shared[:, None], free[:, :1], free)
    agree = (shown[:, :preceding] == shown[:, :1]).all(1)
    rate = (shown[agree, preceding] == shown[agree, 0]).mean()
    assert ideal_agreement(prior, values, preceding) == pytest.approx(rate, abs=0.006)


def test_the_ideal_observer_is_surer_with_every_image_that_agrees():
    rates = [ideal_agreement(0.66, 4, k) for k in range(1, 6)]
    assert rates == sorted(rates) and rates[-1] > 0.99
    assert ideal_agreement(0.66, 4, 0) == 0.25  # of nothing, nothing can be concluded
    assert ideal_agreement(1.0, 4, 1) == 1 and ideal_agreement(0.0, 4, 3) == pytest.approx(0.25)


@pytest.mark.parametrize("true", [0.2, 0.6, 1.0])
def test_correction_undoes_what_an_erring_reader_does(true):
    drawn = np.random.default_rng(1)
    values, accuracy, n = 5, 0.8, 400_000
    agrees = drawn.random(n) < true
    right = drawn.random(n) < accuracy
    by_error = drawn.random(n) < (1 - accuracy) / (values - 1)
    observed = np.where(agrees, right, by_error).mean()
    assert corrected(observed, accuracy, values) == pytest.approx(true, abs=0.01)


def test_correction_leaves_perfect_readers_and_hopeless_ones_alone():
    assert corrected(0.37, 1.0, 4) == pytest.approx(0.37)
    assert corrected(0.37, 0.25, 4) == 0.37
    assert corrected(0.9, 0.8, 4) > 1  # by noise; cutting it off would bias the mean


def test_named_attributes_are_asked_for_and_the_others_may_vary():
    names = list(ATTRIBUTES)
    star = Scene("star", "red", "one", "white", "solid").labels()
    varied = list(star)
    varied[names.index("background")] = 1
    read = torch.tensor([[star, varied]])
    asked, differ = asked_and_free(read, [describe({"shape": "star", "colour": "red"})])
    assert asked == 1.0
    assert differ == pytest.approx(1 / 3)  # of count, background and texture, the background differs
    assert asked_and_free(read, [describe({"shape": "heart"})])[0] == 0.0
    assert asked_and_free(read, [""])[0] is None


def test_angles_between_cameras_are_seen_from_the_origin():
    poses = []
    for degrees in (0, 30, 90, 180):
        a = np.radians(degrees)
        rotation = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
        poses.append(np.hstack([rotation, [[0], [0], [-1.0 - degrees / 90]]]))  # the distance does not matter
    angles = view_angles(torch.tensor(np.stack(poses)))
    assert angles[0].rad2deg().tolist() == pytest.approx([0, 30, 90, 180], abs=1e-4)
    assert torch.allclose(angles, angles.T)


def test_clip_scores_are_torchmetrics_own_with_the_model_itself(small_world):
    """Encoding once and scoring later gives what torchmetrics gives with the model in its hands."""
    clip = Clip("clip", small_world.root, CPU)
    model = CLIPModel.from_pretrained(small_world.root / "clip").eval()
    tokenizer = CLIPTokenizer.from_pretrained(small_world.root / "clip")

    class Model:
        config = model.config

        def to(self, _):
            return self

        def get_image_features(self, pixels):
            found: Any = model.get_image_features(pixel_values=pixels)
            return found.pooler_output

        def get_text_features(self, ids, mask):
            found: Any = model.get_text_features(ids, mask)
            return found.pooler_output

    def processor(images: Any = None, text: Any = None, **_: Any):
        if text is not None:
            return tokenizer(text, return_tensors="pt", padding=True)
        mean, std = (
            torch.tensor([0.48145466, 0.4578275, 0.40821073]),
            torch.tensor([0.26862954, 0.26130258, 0.27577711]),
        )
        pixels = torch.stack(list(images)).float() / 255
        return {"pixel_values": (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)}

    pictures = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    captions = ["three red stars", "a heart", "blue", "two crosses on a black background"]
    metric = CLIPScore(lambda: (Model(), processor))  # type: ignore[arg-type,return-value]
    metric.update(list(pictures), captions)
    ours = clip_scores(clip.pictures(pictures), clip.texts(captions)).mean().item()
    theirs = metric.score / metric.n_samples  # compute() puts a floor of 0 under it, and random towers go below
    assert ours == pytest.approx(float(theirs), abs=1e-5)


def test_pictures_of_any_size_are_seen_whole_by_their_middle(small_world):
    clip = Clip("clip", small_world.root, CPU)
    wide = torch.zeros(1, 3, 32, 64, dtype=torch.uint8)
    wide[..., 16:48] = 200
    square = torch.full((1, 3, 16, 16), 200, dtype=torch.uint8)
    assert torch.allclose(clip.pictures(wide), clip.pictures(square), atol=0.05)


def test_a_folder_that_holds_another_model_is_named(small_world):
    with pytest.raises(InputError, match="dino: not a CLIP model"):
        Clip("dino", small_world.root, CPU)
    with pytest.raises(InputError, match="clip: not a classifier"):
        Reader("clip", small_world.root, CPU)


def test_inception_is_known_by_its_hash(tmp_path, monkeypatch):
    other = tmp_path / "weights.pth"
    other.write_bytes(b"something else")
    with pytest.raises(InputError, match="not pt_inception-2015-12-05"):
        inception_weights(other, "unused")
    with pytest.raises(InputError, match="no such file"):
        inception_weights(tmp_path / "missing.pth", "unused")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with pytest.raises(InputError, match="set inception to it"):
        inception_weights(None, (tmp_path / "nowhere").as_uri())


def test_inceptions_features_of_a_picture_do_not_depend_on_its_batch(tmp_path, monkeypatch):
    """torch-fidelity's extractor comes in training mode. It needs torchvision: a stand-in with its interface."""

    class Extractor(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path):
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)

        def forward(self, pictures):
            normal = self.norm(pictures.float())
            return normal.mean((2, 3)), normal.amax((2, 3))

    name = "torch_fidelity.feature_extractor_inceptionv3"
    module: Any = ModuleType(name)
    module.FeatureExtractorInceptionV3, module.URL_INCEPTION_V3 = Extractor, "unused"
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, name, module)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"weights")
    monkeypatch.setattr(encoders, "_INCEPTION_SHA256", hashlib.sha256(b"weights").hexdigest()[:8])
    backbone = encoders.InceptionBackbone(weights, 64, CPU)
    pictures = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    for whole, alone in zip(backbone(pictures), backbone(pictures[2:3])):
        torch.testing.assert_close(whole[2:3], alone)


def test_a_grid_is_the_same_bytes_and_keeps_its_pictures(tmp_path):
    pictures = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    rows = [[pictures[:2], pictures[2:]], [pictures[:1], pictures[:0]]]
    first, second = (write_grid(tmp_path / name, rows) for name in ("a", "b"))
    assert first.name == "a.png" and first.read_bytes() == second.read_bytes()
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "a.png")))
    top = sheet[2 : 2 + 64, 2 : 2 + 64].permute(2, 0, 1)
    assert torch.equal(top[:, ::4, ::4], pictures[0])


def test_a_grid_of_large_pictures_is_made_smaller(tmp_path):
    rows = [[torch.full((1, 3, 512, 512), 90, dtype=torch.uint8)]]
    with Image.open(write_grid(tmp_path / "large", rows)) as sheet:
        assert sheet.format == "JPEG" and 256 <= min(sheet.size) <= max(sheet.size) < 300
        assert sheet.getpixel((128, 128)) == pytest.approx((90, 90, 90), abs=2)


def test_pictures_of_the_right_size_are_left_alone():
    pictures = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    assert at_size(pictures, 16) is pictures
    assert at_size(pictures, 8).shape == (2, 3, 3, 8, 8)
