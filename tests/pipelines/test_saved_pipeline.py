"""A pipeline's folder: back bit by bit, or refused with what is wrong; and the command that samples from it."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, RepoUrl
from PIL import Image
from safetensors.torch import load_file, save_file

from m2m.config import Compute
from m2m.errors import ArtifactError, ConfigError, InputError
from m2m.pipelines import generate_cli
from m2m.pipelines.many_to_many import ManyToManyPipeline, load_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.* preceding images are given")
ONE_THREAD = Compute(threads=1)  # more would change the last bits


@pytest.fixture
def folder(make_pipeline, tmp_path):
    make_pipeline("self").save_pretrained(tmp_path)
    return tmp_path


def sample(pipeline, images) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(images, 2, num_inference_steps=2, generator=generator, output_type="latent").images


@pytest.mark.parametrize("variant", ["self", "dino"])
def test_a_round_trip_keeps_every_bit(make_pipeline, pictures, tmp_path, variant):
    pipeline = make_pipeline(variant)
    pipeline.register_to_config(context_window=3, feature_size=32 if variant == "dino" else None)
    pipeline.save_pretrained(tmp_path)
    expected = sample(pipeline, pictures())
    for loaded in (ManyToManyPipeline.from_pretrained(tmp_path), load_pipeline(tmp_path, variant, ONE_THREAD)):
        assert torch.equal(sample(loaded, pictures()), expected)
        assert loaded.config["context_window"] == 3


def test_saving_is_deterministic(make_pipeline, tmp_path):
    for name in ("a", "b"):
        make_pipeline("dino").save_pretrained(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) > 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_the_other_variant_is_refused(folder):
    with pytest.raises(ArtifactError, match=r"was made by M2M-Self .*; dino was asked for"):
        load_pipeline(folder, "dino")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no trained model here"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"context_windw": 3}, "context_windw is not"),
        ({"context_window": "gone"}, "context_window is missing"),
        ({"format_version": 9}, "format_version 9"),
        ({"_class_name": "StableDiffusionPipeline"}, "a StableDiffusionPipeline"),
    ],
)
def test_a_wrong_setting_is_named(folder, values, match):
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in index.items() if value != "gone"}))
    with pytest.raises(ConfigError, match=match):
        load_pipeline(folder)


@pytest.mark.parametrize(
    ("part", "file", "name"),
    [
        ("vae", "diffusion_pytorch_model.safetensors", "decoder.conv_in.bias"),
        ("unet", "diffusion_pytorch_model.safetensors", "conv_in.bias"),
        ("image_encoder", "model.safetensors", "layernorm.bias"),
    ],
)
def test_a_missing_tensor_of_any_part_is_named(make_pipeline, tmp_path, part, file, name):
    """diffusers and transformers would start it anew, with a warning at most."""
    make_pipeline("dino").save_pretrained(tmp_path)
    path = tmp_path / part / file
    state = load_file(path)
    del state[name]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(InputError, match=rf"{part}: tensor {name} is missing"):
        ManyToManyPipeline.from_pretrained(tmp_path)


def test_shards_of_every_part_are_read(make_pipeline, pictures, tmp_path):
    pipeline = make_pipeline("dino")
    expected = sample(pipeline, pictures())
    pipeline.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*/*.index.json"))) == 3
    assert torch.equal(sample(ManyToManyPipeline.from_pretrained(tmp_path), pictures()), expected)
    pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*/*.index.json"))
    assert torch.equal(sample(ManyToManyPipeline.from_pretrained(tmp_path), pictures()), expected)
    half = ManyToManyPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {half.unet.dtype, half.vae.dtype, half.image_encoder.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("size", ["5KB", "10GB"])
def test_variants_of_the_weights_of_every_part_lie_beside_the_plain_ones(make_pipeline, pictures, tmp_path, size):
    pipeline = make_pipeline("dino")
    pipeline.save_pretrained(tmp_path, max_shard_size=size)
    expected = sample(pipeline, pictures())
    pipeline.to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16", max_shard_size=size)
    assert torch.equal(sample(ManyToManyPipeline.from_pretrained(tmp_path), pictures()), expected)
    half = ManyToManyPipeline.from_pretrained(tmp_path, variant="bf16", dtype=torch.bfloat16)
    for part in ("unet", "vae", "image_encoder"):
        state = getattr(half, part).state_dict()
        assert all(torch.equal(t, state[name]) for name, t in getattr(pipeline, part).state_dict().items()), part
    with pytest.raises(InputError, match="no part has weights of variant 'fp16'"):
        ManyToManyPipeline.from_pretrained(tmp_path, variant="fp16")
    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / "vae" / (f"{name}.index.json" if size == "5KB" else name)).unlink()
    with pytest.raises(InputError, match=r"vae.*no such file.*variant='bf16'"):
        ManyToManyPipeline.from_pretrained(tmp_path)


def test_a_folder_of_one_variant_alone_is_loaded_by_the_commands(make_pipeline, tmp_path):
    make_pipeline("dino").to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert load_pipeline(tmp_path, compute=ONE_THREAD).unet.dtype == torch.float32
    path = tmp_path / "image_encoder" / "model.fp16.safetensors"
    state = load_file(path)
    del state["layernorm.bias"]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"image_encoder: tensor layernorm\.bias is missing"):
        load_pipeline(tmp_path, compute=ONE_THREAD)


def test_pickles_are_not_written(make_pipeline, tmp_path):
    with pytest.raises(ConfigError, match="safetensors only"):
        make_pipeline("self").save_pretrained(tmp_path, safe_serialization=False)


@pytest.mark.parametrize("by", ["save_pretrained", "push_to_hub"])
def test_a_pushed_pipeline_takes_its_own_model_card_along(make_pipeline, tmp_path, monkeypatch, by):
    """The hub's end stands in: what would be uploaded is what `from_pretrained` reads, with M2M's card."""
    sent: dict[str, dict[str, bytes]] = {}

    def uploaded(*, repo_id, folder_path, **_):
        files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        sent[repo_id] = {path.relative_to(folder_path).as_posix(): path.read_bytes() for path in files}

    def there_is(repo_id, **_):
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def diffusers_own(*_, **__):
        return ModelCard("---\n---\ndiffusers' own")

    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", uploaded)
    for module in ("diffusers.utils.hub_utils", "diffusers.pipelines.pipeline_utils"):
        monkeypatch.setattr(f"{module}.create_repo", there_is)
        monkeypatch.setattr(f"{module}.load_or_create_model_card", diffusers_own)
    pipeline = make_pipeline("self")
    if by == "push_to_hub":
        pipeline.push_to_hub("me/m2m")
    else:
        pipeline.save_pretrained(tmp_path / "m2m", push_to_hub=True, repo_id="me/m2m")
    (files,) = sent.values()
    assert b"# M2M-Self" in files["README.md"]
    for name, content in files.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    assert ManyToManyPipeline.from_pretrained(tmp_path / "back").unet.variant == "self"


def test_parts_that_do_not_belong_together_are_refused(make_pipeline):
    own, dino = make_pipeline("self"), make_pipeline("dino")
    with pytest.raises(ConfigError, match="needs an image_encoder"):
        ManyToManyPipeline(dino.vae, dino.unet, dino.scheduler)
    with pytest.raises(ConfigError, match="no use for an image_encoder"):
        ManyToManyPipeline(own.vae, own.unet, own.scheduler, dino.image_encoder)


def arguments(*given) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    generate_cli.add_arguments(parser)
    return parser.parse_args([*(str(value) for value in given), "--threads", "1"])


def test_the_command_makes_images_of_images(folder, tmp_path, capsys):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "one.png")
    out = tmp_path / "made"
    generate_cli.main(arguments(folder, tmp_path / "one.png", "--num-images", 2, "--steps", 2, "--out", out))
    assert sorted(path.name for path in out.iterdir()) == ["01.png", "02.png"]
    assert str(out / "02.png") in capsys.readouterr().out
    first = (out / "02.png").read_bytes()
    generate_cli.main(arguments(folder, tmp_path / "one.png", "--num-images", 2, "--steps", 2, "--out", out))
    assert (out / "02.png").read_bytes() == first


def test_the_command_takes_conditions(make_pipeline, tmp_path):
    make_pipeline("self", "position").save_pretrained(tmp_path / "model")
    Image.new("RGB", (16, 16)).save(tmp_path / "one.png")
    conditions = tmp_path / "steps.json"
    conditions.write_text(json.dumps({"preceding": [[0]], "target": [[1]]}))
    given = (tmp_path / "model", tmp_path / "one.png", "--steps", 2, "--conditions", conditions, "--out", tmp_path)
    generate_cli.main(arguments(*given))
    assert (tmp_path / "01.png").is_file()
    conditions.write_text(json.dumps({"precding": [[0]]}))
    with pytest.raises(InputError, match="precding is not known"):
        generate_cli.main(arguments(*given))


def test_the_command_names_what_is_no_image(folder, tmp_path):
    (tmp_path / "no.png").write_text("no")
    with pytest.raises(InputError, match=r"no\.png: not an image"):
        generate_cli.main(arguments(folder, tmp_path / "no.png"))
