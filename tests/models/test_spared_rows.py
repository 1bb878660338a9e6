"""Fewer rows at the U-Net's beginning and end, the same predictions, contexts and gradients."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock

from m2m.models.unet import ManyToManyUNet
from tests.models.conftest import SMALL


@contextmanager
def all_rows(unet: ManyToManyUNet):
    """The U-Net as diffusers has it: all rows go from its beginning to its end."""
    kinds: list[tuple[Any, type]] = [(module, type(module)) for module in unet.modules()]
    for module, kind in kinds:
        for plain in (Transformer2DModel, BasicTransformerBlock):
            if issubclass(kind, plain):
                module.__class__ = plain
    yield
    for module, kind in kinds:
        module.__class__ = kind


@pytest.fixture
def rows_behind():
    """`rows_behind(unet)`: the numbers of rows that the layers behind the last attention were given."""

    def watch(unet) -> dict[str, list[int]]:
        block = unet.up_blocks[-1].attentions[-1].transformer_blocks[-1]
        seen: dict[str, list[int]] = {"attention": [], "ff": [], "proj_out": [], "conv_out": []}
        parts = (block.attn2, block.ff, unet.up_blocks[-1].attentions[-1].proj_out, unet.conv_out)
        for name, part in zip(seen, parts):
            part.register_forward_pre_hook(lambda _, given, name=name: seen[name].append(len(given[0])))
        return seen

    return watch


@torch.no_grad()
def test_what_nobody_reads_is_not_computed(make_unet, make_sets, rows_behind):
    unet, given = make_unet("self"), make_sets("self")  # 2 sets of 4 images
    seen = rows_behind(unet)
    unet(**given)
    assert seen == {"attention": [6 + 8], "ff": [8], "proj_out": [8], "conv_out": [8]}
    unet.encode_context(given["clean"])
    assert {name: rows[-1] for name, rows in seen.items()} == {"attention": 8, "ff": 0, "proj_out": 0, "conv_out": 0}
    unet.denoise(given["noisy"][:, 0], 10)
    assert {rows[-1] for rows in seen.values()} == {2}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("variant", "condition"), [("self", None), ("self", "camera"), ("dino", None)])
def test_predictions_and_gradients_are_those_of_the_whole_stream(
    make_unet, make_sets, variant, condition, checkpointing
):
    unet, given = make_unet(variant, condition).train(), make_sets(variant, condition)
    if checkpointing:
        unet.enable_gradient_checkpointing()

    def trained():
        unet.zero_grad()
        predicted = unet(**given, keep_context=torch.tensor([True, False]))
        predicted.square().mean().backward()
        return [predicted, *(parameter.grad.clone() for parameter in unet.parameters())]

    found = trained()
    with all_rows(unet):
        expected = trained()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("variant", "condition"), [("self", None), ("dino", "camera")])
def test_branches_part_at_the_first_attention(make_unet, make_sets, variant, condition):
    unet, given = make_unet(variant, condition), make_sets(variant, condition)
    read, pose = (given["clean"] if variant == "self" else given["features"]), given.get("condition", [None] * 4)
    context = unet.encode_context(read[:, :3], None if condition is None else pose[:, :3])
    of_target = None if condition is None else pose[:, 3]
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    seen: list[int] = []
    for part in (block.attn1, block.attn2):
        part.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    branches = [(None, None), (context, None), (context, of_target)]
    found = unet.denoise_branches(given["noisy"][:, 3], 300, branches)
    assert seen == [2, 6]
    with all_rows(unet):
        expected = unet.denoise_branches(given["noisy"][:, 3], 300, branches)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_context_is_the_whole_stream_s_bit_by_bit(make_unet, make_sets):
    unet, clean = make_unet("self"), make_sets("self")["clean"]
    found = unet.encode_context(clean)
    with all_rows(unet):
        expected = unet.encode_context(clean)
    for one, other in zip(found.keys + found.values, expected.keys + expected.values, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_behind_a_last_block_without_attention_all_rows_go_on(make_sets):
    config = {
        **SMALL,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(0)
    unet = ManyToManyUNet.from_text_to_image(UNet2DConditionModel(**config), "self", seed=1).eval()
    given = make_sets("self", images=3)
    trained = unet(**given)
    alone = unet.denoise(given["noisy"][:, 2], given["timesteps"][:, 2], unet.encode_context(given["clean"][:, :2]))
    torch.testing.assert_close(trained[:, 2], alone, atol=2e-5, rtol=0)
