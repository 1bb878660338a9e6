"""What users of diffusers do with any of its models: other attention code, copies, averages, compilers, precisions."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from m2m.models.unet import ManyToManyUNet

VARIANTS = ("self", "dino")


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("processor", [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(1)])
def test_other_self_attention_code_gives_the_same(make_unet, make_sets, variant, processor):
    unet, given = make_unet(variant), make_sets(variant)
    expected = unet(**given)
    unet.set_attn_processor(processor)
    assert {type(one) for one in unet.attn_processors.values()} == {type(processor)}
    torch.testing.assert_close(unet(**given), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_projections_give_the_same(make_unet, make_sets, variant):
    unet, given = make_unet(variant), make_sets(variant)
    expected = unet(**given)
    unet.fuse_qkv_projections()
    torch.testing.assert_close(unet(**given), expected, atol=1e-5, rtol=1e-5)
    unet.unfuse_qkv_projections()
    assert torch.equal(unet(**given), expected)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_every_kernel_of_torch_gives_the_same(make_unet, make_sets, variant, backend):
    unet, given = make_unet(variant), make_sets(variant)
    expected = unet(**given)
    with sdpa_kernel(backend):
        torch.testing.assert_close(unet(**given), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_predictions_are_repeatable_and_a_copy_makes_them_too(make_unet, make_sets, variant):
    unet, given = make_unet(variant, "camera"), make_sets(variant, "camera")
    expected = unet(**given)
    copied = copy.deepcopy(unet)
    for parameter in unet.parameters():
        parameter.zero_()
    assert torch.equal(copied(**given), expected)
    assert torch.equal(copied(**given), expected)


def test_diffusers_own_average_of_weights_follows_the_training(make_unet, make_sets):
    unet, given = make_unet("self").train(), make_sets("self", images=2)
    average = EMAModel(unet.parameters(), decay=0.5)
    optimizer, steps = torch.optim.SGD(unet.parameters(), lr=0.1), [unet.conv_in.weight.detach().clone()]
    for _ in range(3):
        unet(**given).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        steps.append(unet.conv_in.weight.detach().clone())
    expected = steps[0]
    for n, weight in enumerate(steps[1:]):
        decay = min(0.5, (1 + n) / (10 + n)) if n else 0.0
        expected = decay * expected + (1 - decay) * weight
    average.store(unet.parameters())
    average.copy_to(unet.parameters())
    torch.testing.assert_close(unet.conv_in.weight.detach(), expected)
    average.restore(unet.parameters())
    assert torch.equal(unet.conv_in.weight, steps[-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_under_bfloat16_are_close_and_weights_stay_as_they_are(make_unet, make_sets, variant):
    unet, given = make_unet(variant).train(), make_sets(variant)
    found = []
    for mixed in (False, True):
        unet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            predicted = unet(**given)
        predicted.float().square().mean().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in unet.parameters()]))
        assert {parameter.grad.dtype for parameter in unet.parameters()} == {torch.float32}
    assert (found[1] - found[0]).norm() < 0.05 * found[0].norm()


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_u_net_of_half_precision_is_saved_and_loaded_as_one(make_unet, make_sets, tmp_path, variant):
    unet = make_unet(variant).to(torch.bfloat16)
    unet.save_pretrained(tmp_path)
    kept = ManyToManyUNet.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in unet.state_dict().items())
    widened = ManyToManyUNet.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert widened.dtype == torch.float32
    given = make_sets(variant)
    torch.testing.assert_close(widened.eval()(**given), unet.float()(**given), atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_compiler_traces_it(make_unet, make_sets):
    """Without generating code, which takes minutes: what can't be traced fails here already."""
    unet, given = make_unet("self"), make_sets("self", images=2)
    compiled = torch.compile(unet, backend="eager")
    torch.testing.assert_close(compiled(**given), unet(**given), atol=1e-6, rtol=0)
