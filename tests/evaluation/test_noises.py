"""One evaluation with several noises: the same sets, values averaged by set."""

import json

import numpy as np
import pytest
from pydantic import ValidationError

from m2m.evaluation.per_set import PER_SET, read_per_set
from m2m.evaluation.protocol import Sampler
from m2m.evaluation.sampling_speed import SamplingSpeed

SETTINGS = {"sets": 3, "num_images": 2, "preceding": 2}


def test_values_by_set_are_the_means_over_noises_and_the_rest_is_the_first_ones(evaluate):
    both = evaluate("rollouts", "both", **SETTINGS, noise_seeds=2)
    first, second = (evaluate("rollouts", str(n), **SETTINGS, noise_seed=n) for n in (0, 1))
    found, one, two = (read_per_set(run.out / PER_SET) for run in (both, first, second))
    for name, metric in found.items():
        assert metric.units.tolist() == one[name].units.tolist() == two[name].units.tolist()
        np.testing.assert_allclose(metric.values, (one[name].values + two[name].values) / 2, rtol=1e-12)
    assert any(one[name].mean != two[name].mean for name in found)
    assert (both.out / "M2M-Self.png").read_bytes() == (first.out / "M2M-Self.png").read_bytes()
    told = both.summary["tables"].pop("Means over 2 noises")
    assert both.summary["tables"] == first.summary["tables"]
    assert {row["metric"]: row["mean"] for row in told} == {name: metric.mean for name, metric in found.items()}
    assert all(row["deviation from noise to noise"] >= 0 for row in told)
    assert "over_noises" in json.loads((both.out / "metrics.json").read_text())
    assert not list(both.out.glob(".*")) and both.counts["noises"] == 2


def test_a_noise_that_a_killed_run_has_finished_is_not_sampled_again(evaluate, monkeypatch):
    sample, calls = Sampler.continue_sets, []

    def counted(self, *args, **kwargs):
        calls.append(self._config.noise_seed)
        if calls.count(0) == 1:
            raise KeyboardInterrupt
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(Sampler, "continue_sets", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate("rollouts", **SETTINGS, noise_seeds=2)
    assert calls == [1, 1, 0]
    calls[:] = [0]
    evaluate("rollouts", **SETTINGS, noise_seeds=2)
    assert calls == [0, 0, 0]


def test_time_has_no_noise_to_average(small_world):
    settings = {**small_world.settings, "text_to_image": "text-to-image", "noise_seeds": 2}
    with pytest.raises(ValidationError, match="raise repeats instead"):
        SamplingSpeed.model_validate(settings)
