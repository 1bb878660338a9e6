"""One evaluation with several noises: the same sets, values averaged by set."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from m2m.evaluation.gate import LOOKS, gate, regressions, undecided
from m2m.evaluation.noises import of_part
from m2m.evaluation.per_set import PER_SET, open_per_set, read_per_set, write_per_set
from m2m.evaluation.sampler import Sampler
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


def test_what_a_killed_run_has_finished_is_not_sampled_again(evaluate, monkeypatch):
    sample, calls = Sampler.continue_sets, []

    def counted(self, *args, **kwargs):
        calls.append(self._config.noise_seed)
        if calls.count(2) == 1:
            raise KeyboardInterrupt
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(Sampler, "continue_sets", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate("rollouts", **SETTINGS, noise_seeds=3)
    assert calls == [0, 0, 1, 1, 2]
    calls[:] = [2]
    run = evaluate("rollouts", **SETTINGS, noise_seeds=3)
    assert calls == [2, 2, 2] and run.counts["noises"] == 3 and not list(run.out.glob(".*"))


def test_an_evaluation_goes_on_until_it_is_known_not_to_be_worse(evaluate, tmp_path):
    """Of three sets with one noise nothing is known; with more of them it is, and no more than needed are sampled."""

    def kept(name: str, run) -> Path:
        write_per_set(tmp_path / name, of_part(run, read_per_set(run.out / PER_SET)))
        return tmp_path / name

    accepted = kept("accepted.parquet", evaluate("rollouts", "accepted", **SETTINGS, noise_seeds=LOOKS[1]))
    again = evaluate("rollouts", "again", **SETTINGS, noise_seed=100, accepted=accepted)
    noises = again.counts["noises"]
    assert noises in LOOKS[1:]
    tested = gate(open_per_set(accepted), open_per_set(kept("again.parquet", again)))
    assert regressions(tested) == [] and (noises == LOOKS[-1] or undecided(tested) == [])
    assert all(one.second.noises == noises for one in tested) and not list(again.out.glob(".*"))
    # what is far worse is known at the first look that can tell
    better = {name: replace(one, values=one.values + 9) for name, one in open_per_set(accepted).items()}
    write_per_set(tmp_path / "better", better)
    worse = evaluate("rollouts", "worse", **SETTINGS, noise_seed=100, accepted=tmp_path / "better")
    assert regressions(gate(better, open_per_set(kept("worse.parquet", worse))))
    assert worse.counts.get("noises", 1) <= LOOKS[1]


def test_time_has_no_noise_to_average(small_world):
    settings = {**small_world.settings, "text_to_image": "text-to-image", "noise_seeds": 2}
    with pytest.raises(ValidationError, match="raise repeats instead"):
        SamplingSpeed.model_validate(settings)
