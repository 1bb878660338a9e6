"""Training on the model's own rollouts: who is replaced, by what, and that a resumed training makes the same."""

import json

import pytest
import torch
from diffusers import DDIMScheduler

from m2m.generation.noise import keyed_normal, namespaced
from m2m.models.text_to_image import load_dino, load_vae
from m2m.pipelines.many_to_many import ManyToManyPipeline
from m2m.training.acceleration import open_accelerator
from m2m.training.objective import Objective, SetLoss
from m2m.training.pretrain import Pretrain, pretrain
from m2m.training.rollouts import OwnRollouts
from tests.training.toy import COMPUTE, FEATURES, toy_unet


@pytest.fixture
def rollouts(models):
    def make(variant: str = "self", share: float = 1.0, **unet) -> OwnRollouts:
        pipeline = ManyToManyPipeline(
            vae=load_vae(str(models / "text-to-image"), models),
            unet=toy_unet(variant, **unet),
            scheduler=DDIMScheduler(),  # type: ignore[arg-type]
            image_encoder=load_dino(str(models / "dino"), models) if variant == "dino" else None,
        )
        return OwnRollouts(pipeline, open_accelerator(COMPUTE), seed=7, share=share, steps=2)

    return make


def batch(variant: str = "self", sets: int = 2) -> dict[str, torch.Tensor]:
    given = {"latents": torch.randn(sets, 4, 4, 8, 8)}
    return given | ({"features": torch.randn(sets, 3, 5, FEATURES)} if variant == "dino" else {})


def test_context_is_the_first_image_and_what_the_pipeline_makes_of_it(rollouts):
    own, given = rollouts(), batch()
    ready = own(given, [3, 4], epoch=1)
    assert torch.equal(ready["latents"], given["latents"]), "targets stay the true images"
    assert torch.equal(ready["context"][:, 0], given["latents"][:, 0])
    noise = [keyed_normal(namespaced(7, "rollouts: noise"), 1, sample, shape=(2, 4, 8, 8)) for sample in (3, 4)]
    made = own.pipeline(
        preceding=given["latents"][:, :1],
        num_images=2,
        latents=torch.stack(noise),
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="latent",
    ).images
    assert torch.allclose(ready["context"][:, 1:], made, atol=1e-5)
    assert not ready["context"].requires_grad


def test_features_are_those_of_the_generated_pictures(rollouts):
    own, given = rollouts("dino"), batch("dino")
    ready = own(given, [3, 4], epoch=0)
    assert torch.equal(ready["features"][:, 0], given["features"][:, 0])
    assert not torch.isclose(ready["features"][:, 1:], given["features"][:, 1:]).all(-1).any()
    assert ready["features"].shape == given["features"].shape and "context" not in ready


def test_the_share_is_of_sets_and_goes_by_sample(rollouts):
    own = rollouts(share=0.25)
    replaced = [own.replaces(0, sample) for sample in range(2000)]
    assert sum(replaced) / 2000 == pytest.approx(0.25, abs=0.03)
    assert replaced != [own.replaces(1, sample) for sample in range(2000)]
    who, other = replaced.index(True), replaced.index(False)
    given = batch()
    ready = own(given, [other, who], epoch=0)
    assert torch.equal(ready["context"][0], given["latents"][0, :-1])
    assert not torch.equal(ready["context"][1, 1:], given["latents"][1, 1:-1])
    again = own({"latents": given["latents"][1:]}, [who], epoch=0)
    assert torch.allclose(again["context"][0], ready["context"][1], atol=1e-5)
    assert own(given, [other, other], epoch=0) is given


def test_the_loss_reads_the_models_own_images(rollouts):
    own, given = rollouts(), batch()
    own.pipeline.unet.train()
    ready = own(given, [3, 4], epoch=0)
    assert own.pipeline.unet.training, "as it was"
    loss = SetLoss(own.pipeline.unet, DDIMScheduler())
    draws = Objective(seed=0, context_dropout=0.0).draw([3, 4], 0, given["latents"].shape[1:])
    with_own = loss(given["latents"], draws, context=ready["context"])
    assert not torch.allclose(with_own, loss(given["latents"], draws))
    with_own.sum().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in own.pipeline.unet.parameters())


def test_a_training_on_rollouts_goes_on_exactly(start_run, image_sets, models, quick, monkeypatch):
    settings = Pretrain.model_validate(
        {
            **quick,
            "text_to_image": str(models / "text-to-image"),
            "rollout_share": 0.5,
            "rollout_steps": 2,
            "images_per_set": 4,
            "sample_sets": 0,
            "validation_sets": 0,
        }
    )
    runs = [start_run("pretrain@self", {"sets": image_sets}, name) for name in ("whole", "killed", "plain")]
    pretrain(settings, runs[0])

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("m2m.training.loop._Trainer.adopt_average", killed)
        pretrain(settings.model_copy(update={"steps": 2, "epochs": 1}), runs[1])
    pretrain(settings, runs[1])
    pretrain(settings.model_copy(update={"rollout_share": 0.0}), runs[2])
    logs = [(run.out / "training_log.jsonl").read_text() for run in runs]
    assert logs[0] == logs[1]
    weights = [(run.out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for run in runs[:2]]
    assert weights[0] == weights[1]
    assert json.loads(logs[0].splitlines()[-1])["loss"] != json.loads(logs[2].splitlines()[-1])["loss"]
