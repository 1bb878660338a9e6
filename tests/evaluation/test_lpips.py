"""LPIPS against its formula written out with torchmetrics' own parts."""

import hashlib

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.image.lpips import NetLinLayer, ScalingLayer

from m2m.config import Compute
from m2m.errors import InputError
from m2m.evaluation import lpips
from m2m.evaluation.lpips import Lpips, learnt_heads

CPU = Compute(device="cpu", dtype="float32", threads=1)
CHANNELS = (64, 192, 384, 256, 256)


@pytest.fixture(scope="module")
def trunk(alexnet_weights) -> dict[str, torch.Tensor]:
    return alexnet_weights(0)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (2, 5, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def _reference(trunk, one, two) -> torch.Tensor:
    scaling, heads = ScalingLayer(), learnt_heads()

    def layers(x):
        x = scaling(x.float() / 255 * 2 - 1)
        found = []
        for place, (stride, padding) in {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}.items():
            x = F.max_pool2d(x, 3, 2) if place in (3, 6) else x
            x = F.conv2d(x, trunk[f"features.{place}.weight"], trunk[f"features.{place}.bias"], stride, padding).relu()
            found.append(F.normalize(x, dim=1))
        return found

    total = torch.zeros(len(one))
    for n, (a, b) in enumerate(zip(layers(one), layers(two))):
        linear = NetLinLayer(CHANNELS[n], use_dropout=True).eval()
        linear.load_state_dict({"model.1.weight": heads[f"lin{n}.model.1.weight"]})
        total += linear((a - b).square()).detach().mean((1, 2, 3))
    return total


def test_lpips_is_the_formula_with_torchmetrics_weightings(trunk, pictures):
    measure = Lpips(trunk, learnt_heads(), CPU)
    found = measure(*pictures)
    assert found.shape == (5,) and (found > 0).all()
    torch.testing.assert_close(found, _reference(trunk, *pictures), rtol=1e-4, atol=1e-6)
    assert measure(pictures[0], pictures[0]).tolist() == [0] * 5
    near = (pictures[0].int() + 5).clamp(0, 255).to(torch.uint8)
    assert (measure(pictures[0], near) < found).all()


def test_its_file_is_known_by_its_hash(trunk, tmp_path, monkeypatch, pictures):
    path = tmp_path / lpips.WEIGHTS
    with pytest.raises(InputError, match="no such file; expected alexnet-owt"):
        Lpips.open(path, CPU)
    torch.save(trunk, path)
    with pytest.raises(InputError, match=r"not alexnet-owt-7be5be79.pth: sha256 \w{8}\.\.\., not 7be5be79"):
        Lpips.open(path, CPU)
    monkeypatch.setattr(lpips, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    assert torch.equal(Lpips.open(path, CPU)(*pictures), Lpips(trunk, learnt_heads(), CPU)(*pictures))


def test_what_it_can_not_measure_is_refused(trunk):
    with pytest.raises(InputError, match="not AlexNet's weights"):
        Lpips({"features.0.weight": trunk["features.0.weight"]}, learnt_heads(), CPU)
    small = torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"31 pixels or more, got \(24, 24\)"):
        Lpips(trunk, learnt_heads(), CPU)(small, small)
