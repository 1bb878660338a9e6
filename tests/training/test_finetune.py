"""Fine-tuning: sets of views and steps, padding, both tasks from a base to a pipeline with a condition."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from m2m.artifacts import record_files
from m2m.data.objaverse import ObjaverseViews, relative_poses
from m2m.data.vgsi import Procedures
from m2m.errors import ArtifactError, ConfigError
from m2m.generation.noise import keyed_generator
from m2m.pipelines.many_to_many import load_pipeline
from m2m.tiny.export import export
from m2m.training.finetune import Finetune, conditioned_pipeline, finetune
from m2m.training.pretrain import Pretrain, pretrain
from m2m.training.task_sets import NovelViews, TaskSets, VisualProcedures
from tests.training.conftest import SIDE

STEPS = (4, 1, 2, 5)  # of the procedures; the second tells nothing of a next step


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    """Four objects of four views; one view is damaged."""
    folder = tmp_path_factory.mktemp("objaverse")
    drawn = keyed_generator(1)
    for number in range(4):
        (folder / f"object-{number}").mkdir()
        for view in range(4):
            _picture(folder / f"object-{number}" / f"{view:03d}.png", drawn)
            turn, _ = np.linalg.qr(drawn.standard_normal((3, 3)))
            np.save(folder / f"object-{number}" / f"{view:03d}.npy", np.c_[turn, drawn.standard_normal(3)])
    (folder / "object-1" / "003.png").write_bytes(b"no picture")
    (folder / "valid_paths.json").write_text(json.dumps([f"object-{number}" for number in range(4)]))
    return folder


@pytest.fixture(scope="session")
def procedures(tmp_path_factory):
    """Articles of one method each, all steps illustrated."""
    folder = tmp_path_factory.mktemp("vgsi")
    drawn, lines = keyed_generator(2), []
    for split, first in (("train", 0), ("test", 10)):
        (folder / "wiki_images" / split).mkdir(parents=True)
        for article, steps in enumerate(STEPS, first):
            ids = [f"{article}_0_{step}" for step in range(steps)]
            for step in ids:
                _picture(folder / "wiki_images" / split / f"{step}.png", drawn)
            method = {"name": "", "steps": [{"step_id": step, "headline": step} for step in ids]}
            lines.append(json.dumps({"goal": f"goal {article}", "methods": [method]}))
    (folder / "WikihowText_data.json").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def base(start_run, image_sets, models, quick):
    run = start_run("pretrain@dino", {"sets": image_sets}, "base")
    sources = {"text_to_image": str(models / "text-to-image"), "dino": str(models / "dino"), "features": "online"}
    pretrain(Pretrain.model_validate({**sources, **quick, "steps": 1, "sample_sets": 0}), run)
    return run.out


def test_a_set_of_views_has_poses_relative_to_its_first(objects):
    views = ObjaverseViews(objects, "train", size=SIDE)
    sets = TaskSets(NovelViews(views), 3, seed=0)
    item = sets[0, 0]
    assert torch.allclose(item["condition"][0], torch.eye(3, 4).flatten(), atol=1e-6)
    whole = views[0]
    order = [next(v for v in range(4) if torch.equal(whole.images[v], picture)) for picture in item["pictures"]]
    assert torch.allclose(item["condition"], relative_poses(whole.poses[order]).float())
    assert not torch.equal(item["pictures"], sets[1, 0]["pictures"])
    again = TaskSets(NovelViews(views), 3, seed=0)[0, 0]
    assert all(torch.equal(item[name], again[name]) for name in item)


def test_steps_follow_each_other_and_short_procedures_are_padded(procedures):
    task = VisualProcedures(Procedures(procedures, "train"), SIDE)
    assert [one.reason for one in task.set_aside] == ["its procedure's only step"]
    sets = TaskSets(task, 3, seed=0)
    assert len(sets) == 3
    firsts = set()
    for epoch in range(20):
        positions = sets[epoch, 0]["condition"].flatten().tolist()
        assert positions == [positions[0], positions[0] + 1, positions[0] + 2]
        firsts.add(positions[0])
    assert firsts == {0.0, 1.0}
    short = sets[0, 1]
    assert int(short["counts"]) == 2 and short["condition"].flatten().tolist() == [0, 1, 1]
    assert int(sets[0, 2]["counts"]) == 3


@pytest.mark.parametrize(("variant", "condition"), [("nvs", "camera"), ("vgsi", "position")])
def test_a_fine_tuned_folder_is_a_pipeline_with_a_condition(
    variant, condition, base, objects, procedures, start_run, quick
):
    run = start_run(f"finetune@{variant}", {"base": base})
    settings = {**quick, "data": str(objects if variant == "nvs" else procedures), "cache_in_memory": variant == "nvs"}
    finetune(Finetune.model_validate(settings), run)
    pipeline = load_pipeline(run.out, "dino")
    assert pipeline.unet.config.condition == condition
    assert any(weight.any() for weight in pipeline.unet.condition_embedder.heads.parameters()), "was trained"
    numbers = 12 if variant == "nvs" else 1
    made = pipeline(
        images=torch.rand(1, 1, 3, SIDE, SIDE),
        condition=torch.rand(1, 1, numbers),
        target_condition=torch.rand(1, 2, numbers),
        num_images=2,
        num_inference_steps=2,
        output_type="pt",
    ).images
    assert isinstance(made, torch.Tensor) and made.isfinite().all()
    aside = json.loads((run.out / "set_aside.json").read_text())
    assert [one["path"] for one in aside] == (["object-1/003.png"] if variant == "nvs" else ["11_0_0", "1_0_0"])
    assert run.counts["set_aside"] == len(aside)
    assert run.summary["figures"]["started_from"] == "base"
    assert (run.out / "sample.png").is_file()


def test_a_fine_tuned_model_is_trained_on(base, objects, procedures, start_run, quick, tmp_path):
    first = start_run("finetune@nvs", {"base": base})
    settings = {**quick, "data": str(objects), "sample_sets": 0}
    finetune(Finetune.model_validate(settings), first)
    shipped = export(str(first.out), tmp_path / "shipped")
    assert json.loads((shipped / "made_by.json").read_text())["command"].startswith(
        "python -m m2m finetune --variant nvs"
    )
    scheduler = shipped / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    second = start_run("finetune@nvs", {"base": base}, "second")
    finetune(Finetune.model_validate({**settings, "init_from": str(shipped), "steps": 0}), second)
    before, taken = load_pipeline(first.out), load_pipeline(second.out)
    for name, weight in taken.unet.state_dict().items():
        assert torch.equal(weight, before.unet.state_dict()[name].half().float()), name
    assert taken.scheduler.config["prediction_type"] == "v_prediction"
    assert second.summary["figures"]["started_from"].startswith("shipped/out, made by: python -m m2m finetune")
    other = Finetune.model_validate({**settings, "data": str(procedures), "init_from": str(shipped)})
    with pytest.raises(ArtifactError, match="not fine-tuned with positions"):
        finetune(other, start_run("finetune@vgsi", {"base": base}, "other"))
    with pytest.raises(ArtifactError, match="not fine-tuned with cameras"):
        Finetune.model_validate({**settings, "init_from": str(base)}).preview(tmp_path, "nvs")


def test_images_kept_in_memory_train_the_same(base, objects, start_run, quick):
    losses = []
    for kept in (True, False):
        run = start_run("finetune@nvs", {"base": base}, f"kept-{kept}")
        settings = {**quick, "data": str(objects), "cache_in_memory": kept, "sample_sets": 0}
        finetune(Finetune.model_validate(settings), run)
        losses.append([json.loads(line)["loss"] for line in (run.out / "training_log.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_lora_leaves_a_plain_pipeline_and_its_adapter_beside(base, objects, start_run, quick):
    pytest.importorskip("peft")
    settings = Finetune.model_validate(
        {**quick, "data": str(objects), "lora_rank": 2, "lora_alpha": 6, "sample_sets": 0, "cache_in_memory": True}
    )
    run = start_run("finetune@nvs", {"base": base})
    finetune(settings, run)
    exported, before = load_pipeline(run.out, "dino").unet.state_dict(), load_pipeline(base, "dino").unet.state_dict()
    adapter = load_file(run.out / "lora" / "pytorch_lora_weights.safetensors")
    adapted = {name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")}
    assert any(name.endswith("attn1.to_q") for name in adapted) and any(name.endswith("attn2.to_v") for name in adapted)
    for name, weight in before.items():
        part = name.removesuffix(".weight")
        if part in adapted:
            product = adapter[f"{part}.lora_B.weight"] @ adapter[f"{part}.lora_A.weight"]
            assert product.any(), "was trained"
            assert torch.allclose(exported[name], weight + 3.0 * product, atol=1e-6), name
        else:
            assert torch.equal(exported[name], weight), name
    by_diffusers = load_pipeline(base, "dino").unet
    by_diffusers.load_lora_adapter(str(run.out / "lora"), prefix=None, use_safetensors=True)
    by_diffusers.fuse_lora()
    by_diffusers.unload_lora()
    for name, weight in by_diffusers.state_dict().items():
        assert torch.allclose(exported[name], weight, atol=1e-6), name
    heads = [weight for name, weight in exported.items() if name.startswith("condition_embedder.heads")]
    assert heads and all(weight.any() for weight in heads if weight.ndim > 1), "the condition embedder is trained whole"
    trained = run.summary["figures"]["trained_parameters"]
    assert trained == sum(map(torch.numel, adapter.values())) + sum(
        weight.numel() for name, weight in exported.items() if "condition_embedder." in name
    )


def test_a_lora_training_goes_on_exactly(base, objects, start_run, quick, monkeypatch):
    pytest.importorskip("peft")
    settings = Finetune.model_validate(
        {**quick, "data": str(objects), "lora_rank": 2, "sample_sets": 0, "validation_sets": 0, "epochs": 3}
    )
    whole, killed = (start_run("finetune@nvs", {"base": base}, name) for name in ("whole", "killed"))
    finetune(settings, whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("m2m.training.course.save_lora", _killed)
        finetune(settings.model_copy(update={"steps": 2}), killed)
    (small,) = (killed.out / "checkpoints").glob("step-000002/unet.safetensors")
    assert not any("base_layer" in name for name in load_file(small)), "frozen weights need no checkpoint"
    finetune(settings, killed)
    assert record_files(whole.out) == record_files(killed.out)


def test_images_and_condition_dropped_together_are_so_by_set(objects):
    with pytest.raises(ValueError, match="leave dropping=set"):
        Finetune.model_validate({"data": str(objects), "drop_together": True, "dropping": "image"})


def test_peft_is_asked_for_by_name_where_it_is_missing(objects, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"lora_rank is set.*pip install peft"):
        Finetune.model_validate({"data": str(objects), "lora_rank": 4}).preview(tmp_path, "nvs")


def test_only_a_base_of_m2m_dino_can_be_fine_tuned(base, image_sets, models, quick, start_run, tmp_path):
    with pytest.raises(ArtifactError, match="no trained model here"):
        conditioned_pipeline(tmp_path / "nowhere", "camera", 0)
    conditioned = conditioned_pipeline(base, "camera", 0)
    conditioned.unet.save_pretrained(tmp_path / "again" / "unet")
    with pytest.raises(ArtifactError, match="fine-tuned already"):
        conditioned_pipeline(tmp_path / "again", "camera", 0)


def test_preview_opens_the_data(objects, procedures, models, tmp_path):
    said = Finetune.model_validate({"data": str(objects)}).preview(tmp_path, "nvs")
    assert said[0] == "3 objects to train on, 1 held out, 1 set aside"
    known = {"text_to_image": str(models / "text-to-image"), "dino": str(models / "dino")}
    said = Finetune.model_validate({"data": str(procedures), **known}).preview(tmp_path, "vgsi")
    assert said[0] == "3 procedures to train on, 3 held out, 1 set aside"
    assert said[1] == "starts from: the base" and "with a position embedder" in said[2]


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def _picture(path, drawn: np.random.Generator) -> None:
    Image.fromarray(drawn.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path)
