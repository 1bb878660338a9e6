"""`from_pretrained("tiny")`: the shipped models by name, from anywhere."""

import pytest
import torch
from PIL import Image

from m2m.cli import main
from m2m.errors import ArtifactError
from m2m.pipelines.many_to_many import ManyToManyPipeline, load_pipeline
from m2m.tiny import EMBEDDED, WEIGHTS
from m2m.training.starting import continued_unet


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name, variant", EMBEDDED.items())
def test_a_name_is_enough(name, variant):
    pipeline = ManyToManyPipeline.from_pretrained(name, dtype=torch.bfloat16)
    assert pipeline.unet.variant == variant and pipeline.unet.dtype == torch.bfloat16
    assert pipeline.scheduler.config["prediction_type"] == "v_prediction"
    assert pipeline.card.label == "tiny"
    width = None if pipeline.image_encoder is None else pipeline.image_encoder.config.hidden_size
    shipped = continued_unet(WEIGHTS / f"m2m-{variant}", variant, width, {}).bfloat16().state_dict()
    assert all(torch.equal(weight, shipped[key]) for key, weight in pipeline.unet.state_dict().items())


def test_as_a_command(tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save("a.png")
    assert main(["generate", "tiny-self", "a.png", "--num-images", "2", "--steps", "2", "--out", "made"]) == 0
    assert sorted(path.name for path in (tmp_path / "made").glob("*.png")) == ["01.png", "02.png"]


def test_the_other_variant_is_refused_and_a_folder_of_the_name_goes_first(tmp_path):
    with pytest.raises(ArtifactError, match="tiny was made by M2M-DINO"):
        load_pipeline("tiny", "self")
    (tmp_path / "tiny").mkdir()
    with pytest.raises(ArtifactError, match="tiny: no trained model here"):
        load_pipeline("tiny")
