"""What later evaluations are held against, made beside a profile's outputs."""

import json

import numpy as np
import pytest

from m2m import artifacts
from m2m.errors import ArtifactError, ConfigError
from m2m.evaluation import accept
from m2m.evaluation.gate import gate, regressions
from m2m.evaluation.per_set import open_per_set
from m2m.evaluation.sampler import Sampler
from m2m.progress import Progress
from m2m.stages import STAGES

INPUTS = {"sets": "generate-sets", "m2m_self": "pretrain@self", "m2m_dino": "pretrain@dino"}


@pytest.fixture
def profile(small_world, tmp_path):
    """A profile whose models and sets stand as outputs do."""
    section = {
        **small_world.settings,
        "batch": 2,
        "variants": {"rollouts": {"sets": 3, "num_images": 2}, "consistency": {"sets": 3, "num_images": 2}},
    }
    made = small_world.profile({"evaluate": section}, tmp_path / "outputs")
    for name, key in INPUTS.items():
        folder = STAGES[key].folder(made)
        folder.parent.mkdir(parents=True, exist_ok=True)
        small_world.stand(name, key, folder)
    return made


def test_values_of_so_many_noises_lie_beside_the_outputs_and_are_made_once(profile, monkeypatch):
    before = {path for path in profile.outputs.rglob("*") if path.is_file()}
    path = accept.accept(profile, 2, ["rollouts"], Progress(quiet=True))
    metrics = open_per_set(path)
    assert metrics and all(name.startswith("rollouts: ") and one.noises == 2 for name, one in metrics.items())
    assert regressions(gate(metrics, metrics)) == []
    told = json.loads((path.parent / "accepted.json").read_text())
    models = artifacts.read_manifest(STAGES["pretrain@self"].folder(profile))
    assert models is not None and told["rollouts"]["inputs"]["m2m_self"] == models.digest
    assert told["rollouts"]["noises"] == 2
    after = {found for found in profile.outputs.rglob("*") if found.is_file() and path.parent not in found.parents}
    assert after == before
    monkeypatch.setattr(Sampler, "continue_sets", lambda *_, **__: pytest.fail("sampled again"))
    assert open_per_set(accept.accept(profile, 2, ["rollouts"], Progress(quiet=True))).keys() == metrics.keys()


def test_one_evaluation_accepted_alone_leaves_what_was_accepted_of_others(profile):
    before = open_per_set(accept.accept(profile, 2, ["rollouts"], Progress(quiet=True)))
    after = open_per_set(path := accept.accept(profile, 1, ["consistency"], Progress(quiet=True)))
    assert {name.partition(":")[0] for name in after} == {"rollouts", "consistency"}
    assert all(
        np.array_equal(after[name].values, one.values) and after[name].noises == 2 for name, one in before.items()
    )
    told = json.loads((path.parent / "accepted.json").read_text())
    assert {name: one["noises"] for name, one in told.items()} == {"rollouts": 2, "consistency": 1}


def test_models_that_are_not_whole_can_not_be_accepted(profile):
    (STAGES["pretrain@dino"].folder(profile) / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="pretrain --variant dino"):
        accept.accept(profile, 2, ["rollouts"], Progress(quiet=True))


def test_an_unknown_evaluation_is_named_and_nothing_is_accepted(profile):
    with pytest.raises(ConfigError, match=r"tabel_1: .* table_1"):
        accept.accept(profile, 2, ["tabel_1"], Progress(quiet=True))
    assert not (profile.outputs / accept.ACCEPTED).exists()
