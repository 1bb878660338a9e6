"""Saved U-Nets come back bit by bit, or are refused with the name of what is wrong."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from m2m.errors import ConfigError, InputError
from m2m.models.unet import ManyToManyUNet

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def saved(make_unet, tmp_path):
    make_unet("self", "camera").save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


def change_weights(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


@pytest.mark.parametrize(("variant", "condition"), [("self", None), ("dino", None), ("dino", "camera")])
def test_a_round_trip_keeps_every_bit(make_unet, make_sets, tmp_path, variant, condition):
    unet = make_unet(variant, condition, clean_timestep=7)
    unet.save_pretrained(tmp_path)
    back = ManyToManyUNet.from_pretrained(tmp_path)
    own, found = (json.loads(model.to_json_string()) for model in (unet, back))
    found.pop("_name_or_path", None)
    assert own == found
    assert found["clean_timestep"] == 7
    state = back.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())
    given = make_sets(variant, condition)
    with torch.no_grad():
        assert torch.equal(unet(**given), back.eval()(**given))


def test_the_same_weights_make_the_same_bytes(make_unet, tmp_path):
    for folder in ("a", "b"):
        make_unet("self").save_pretrained(tmp_path / folder)
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_shards_are_read(make_unet, tmp_path):
    unet = make_unet("self")
    unet.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / f"{WEIGHTS}.index.json").exists()
    state = ManyToManyUNet.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())


def test_saving_anew_leaves_nothing_of_the_earlier_save(make_unet, tmp_path):
    """diffusers would leave an index of shards that are gone, or a whole file beside newer shards."""
    unet = make_unet("self")
    for sizes in ("100KB", "10GB", "100KB"):
        unet.save_pretrained(tmp_path, max_shard_size=sizes)
        whole, sharded = (tmp_path / WEIGHTS).exists(), (tmp_path / f"{WEIGHTS}.index.json").exists()
        assert (whole, sharded) == (sizes == "10GB", sizes == "100KB")
        state = ManyToManyUNet.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize("size", ["100KB", "10GB"])
def test_variants_of_the_weights_lie_beside_the_plain_ones(make_unet, tmp_path, size):
    unet = make_unet("self")
    unet.save_pretrained(tmp_path, max_shard_size=size)
    half = copy.deepcopy(unet).half()
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    for saved, variant, dtype in ((unet, None, torch.float32), (half, "fp16", torch.float16)):
        state = ManyToManyUNet.from_pretrained(tmp_path, variant=variant, torch_dtype=dtype).state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in saved.state_dict().items())
    with pytest.raises(InputError, match=r"ema\.safetensors: no such file.* there are others: variant='fp16'"):
        ManyToManyUNet.from_pretrained(tmp_path, variant="ema")


def test_a_variant_is_read_as_strictly_and_saved_anew_as_whole(make_unet, tmp_path):
    unet = make_unet("self").half()
    for size in ("10GB", "100KB"):
        unet.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    assert not (tmp_path / "diffusion_pytorch_model.fp16.safetensors").exists()
    shard = sorted(tmp_path.glob("*.fp16-00001-of-*.safetensors"))[0]
    state = load_file(shard)
    gone = sorted(state)[0]
    save_file({name: tensor for name, tensor in state.items() if name != gone}, shard)
    with pytest.raises(InputError, match=rf"tensor {gone} is missing"):
        ManyToManyUNet.from_pretrained(tmp_path, variant="fp16")
    with pytest.raises(InputError, match=r"model\.safetensors: no such file.*variant='fp16'"):
        ManyToManyUNet.from_pretrained(tmp_path)


def test_the_average_that_diffusers_keeps_is_saved_and_read_by_both(make_unet, tmp_path):
    unet = make_unet("self", "camera")
    average = EMAModel(unet.parameters(), decay=0.9, model_cls=ManyToManyUNet, model_config=unet.config)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(1.0)
    average.step(unet.parameters())
    average.step(unet.parameters())
    average.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["optimization_step"] == 2
    read = ManyToManyUNet.from_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, ManyToManyUNet)
    assert again.optimization_step == 2 and again.decay == 0.9
    for parameter, kept, shadow in zip(read.parameters(), average.shadow_params, again.shadow_params, strict=True):
        assert torch.equal(parameter, kept) and torch.equal(shadow, kept)
    change_weights(tmp_path, lambda state: state.pop("conv_in.bias"))
    with pytest.raises(InputError, match=r"tensor conv_in\.bias is missing"):
        ManyToManyUNet.from_pretrained(tmp_path)


def test_pickles_are_not_written(make_unet, tmp_path):
    with pytest.raises(ConfigError, match="safetensors only"):
        make_unet("self").save_pretrained(tmp_path, safe_serialization=False)


def test_a_missing_shard_and_a_tensor_missing_in_a_shard_are_named(make_unet, tmp_path):
    make_unet("self").save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*-00001-of-*.safetensors"))[0]
    state = load_file(shard)
    gone = sorted(state)[0]
    save_file({name: tensor for name, tensor in state.items() if name != gone}, shard)
    with pytest.raises(InputError, match=rf"tensor {gone} is missing"):
        ManyToManyUNet.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name}: no such file"):
        ManyToManyUNet.from_pretrained(tmp_path)


def test_a_missing_tensor_is_named(saved):
    change_weights(saved, lambda state: state.pop("conv_in.bias"))
    with pytest.raises(InputError, match=r"tensor conv_in\.bias is missing"):
        ManyToManyUNet.from_pretrained(saved)


def test_an_extra_tensor_is_named(saved):
    change_weights(saved, lambda state: state.update({"conv_out.scale": torch.zeros(1)}))
    with pytest.raises(InputError, match=r"conv_out\.scale has no place"):
        ManyToManyUNet.from_pretrained(saved)


def test_a_mismatched_tensor_is_named(saved):
    change_weights(saved, lambda state: state.update({"conv_in.bias": torch.zeros(3)}))
    with pytest.raises(InputError, match=r"conv_in\.bias has shape \(3,\); the config asks for \(16,\)"):
        ManyToManyUNet.from_pretrained(saved)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"clean_timestp": 3}, "clean_timestp is not a setting"),
        ({"clean_timestep": "gone"}, "setting clean_timestep is missing"),
        ({"format_version": 2}, "format_version 2; this version reads 1"),
        ({"format_version": "gone"}, "format_version None"),
        ({"_class_name": "UNet2DConditionModel"}, "a UNet2DConditionModel, not a ManyToManyUNet"),
    ],
)
def test_a_wrong_setting_is_named(saved, values, match):
    change_config(saved, **values)
    with pytest.raises(ConfigError, match=match):
        ManyToManyUNet.from_pretrained(saved)


def test_pickles_and_broken_files_are_refused(saved):
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        ManyToManyUNet.from_pretrained(saved)
    (saved / WEIGHTS).unlink()
    torch.save({}, saved / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors only"):
        ManyToManyUNet.from_pretrained(saved)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="no saved model"):
        ManyToManyUNet.from_pretrained(tmp_path)


def test_loaded_weights_lie_where_torch_puts_its_own(saved):
    """Elsewhere CPU kernels give other last bits: a loaded model would not be the saved one."""
    loaded = ManyToManyUNet.from_pretrained(saved)
    assert {parameter.data_ptr() % 64 for parameter in loaded.parameters()} == {0}


def test_the_folders_of_released_formats_still_load_and_predict_the_same():
    """`golden/`: models saved by format 1 with what they predicted. A change of names or meaning shows here."""
    folders = sorted(path.parent for path in GOLDEN.glob("*/expected.safetensors"))
    assert [folder.name for folder in folders] == ["1-dino-position", "1-self"]
    for folder in folders:
        unet, kept = ManyToManyUNet.from_pretrained(folder).eval(), load_file(folder / "expected.safetensors")
        predicted = kept.pop("predicted")
        with torch.no_grad():
            torch.testing.assert_close(unet(**kept), predicted, atol=2e-5, rtol=1e-4)
