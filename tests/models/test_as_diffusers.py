"""What users of diffusers do with any of its models: other attention code, copies, averages, compilers, precisions."""

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from m2m.errors import ConfigError
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


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_default_attention_code_comes_back(make_unet, make_sets, variant):
    unet, given = make_unet(variant), make_sets(variant)
    expected = unet(**given)
    unet.set_attn_processor(AttnProcessor())
    unet.set_default_attn_processor()
    torch.testing.assert_close(unet(**given), expected, atol=1e-5, rtol=1e-5)
    unet.set_attention_slice("max")
    torch.testing.assert_close(unet(**given), expected, atol=1e-5, rtol=1e-5)


def passes(unet: ManyToManyUNet, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What each kind of pass predicts: training, and denoising from an encoded context and from none."""
    read = given["clean"][:, :-1] if "clean" in given else given["features"]
    condition = given.get("condition")
    context = unet.encode_context(read, None if condition is None else condition[:, :-1])
    branches = [(None, None), (context, None if condition is None else condition[:, -1])]
    return [unet(**given), *unet.denoise_branches(given["noisy"][:, -1], torch.tensor(500), branches)]


@torch.no_grad()
@pytest.mark.parametrize(("variant", "condition"), [("self", None), ("dino", "camera"), ("self", "position")])
def test_weights_may_lie_elsewhere_until_a_layer_needs_them(make_unet, make_sets, tmp_path, variant, condition):
    """Accelerate's offloading by layers (`enable_sequential_cpu_offload`), to disk, and diffusers' by groups."""
    given = make_sets(variant, condition)
    expected = passes(make_unet(variant, condition), given)
    here = torch.device("cpu")
    by_layer: Any = cpu_offload(make_unet(variant, condition), here, offload_buffers=True)
    assert by_layer.conv_in.weight.is_meta
    on_disk: Any = disk_offload(make_unet(variant, condition), str(tmp_path), here)
    by_group = make_unet(variant, condition)
    by_group.enable_group_offload(here, here, offload_type="leaf_level")
    for unet in (by_layer, on_disk, by_group):
        for found, wanted in zip(passes(unet, given), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match='offload_type="leaf_level"'):
        make_unet(variant).enable_group_offload(here, here, num_blocks_per_group=1)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_map_of_devices_may_put_parts_anywhere(make_unet, make_sets, tmp_path, variant):
    unet, given = make_unet(variant), make_sets(variant)
    unet.save_pretrained(tmp_path / "model")
    size = sum(tensor.numel() * tensor.element_size() for tensor in unet.state_dict().values())
    mapped: Any = ManyToManyUNet.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": int(0.6 * size)},
        offload_folder=str(tmp_path / "offloaded"),
    ).eval()
    assert set(mapped.hf_device_map.values()) == {"cpu", "disk"}
    assert not [name for name in mapped.hf_device_map if ".transformer_blocks.0." in name], "blocks are not torn apart"
    for found, wanted in zip(passes(mapped, given), passes(unet, given), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("variant", "condition"), [("self", None), ("dino", "camera")])
def test_weights_stored_in_bytes_are_computed_with_in_full(make_unet, make_sets, variant, condition):
    unet, given = make_unet(variant, condition), make_sets(variant, condition)
    exact = passes(unet, given)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert unet.conv_in.weight.dtype == torch.float8_e4m3fn and unet.dtype == torch.float32
    for found, wanted in zip(passes(unet, given), exact, strict=True):
        assert found.dtype == torch.float32
        assert 0 < (found - wanted).norm() < 0.2 * wanted.norm()


@torch.no_grad()
@pytest.mark.parametrize(("variant", "calls"), [("self", 2 + 1 + 1), ("dino", 2 + 0 + 1)])
def test_every_pass_is_a_call_of_the_module(make_unet, make_sets, variant, calls):
    """Which is what hooks and `unet.compile()` take hold of. M2M-DINO's contexts are two projections a layer."""
    unet, seen = make_unet(variant), []
    unet.register_forward_pre_hook(lambda *_: seen.append(1))
    passes(unet, make_sets(variant))
    assert len(seen) == calls


def test_all_repeated_blocks_are_compiled(make_unet):
    unet = make_unet("self")
    unet.compile_repeated_blocks(backend="eager")
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    assert len(blocks) == 7 and all(block._compiled_call_impl is not None for block in blocks)
