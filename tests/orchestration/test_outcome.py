"""What came of a stage, as Dagster shows it. Every stage here is a process of its own, heard over real Pipes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2m.arguments import parse_shards
from m2m.stages import shard_key
from orchestration.launchers.outcome import shard_ranges


def failure(result):
    (event,) = (event for event in result.all_events if event.is_step_failure)
    return event.step_failure_data


def checks(result) -> dict[str, bool]:
    return {e.check_name: e.passed for e in result.get_asset_check_evaluations()}


def test_a_materialization_carries_figures_a_picture_and_the_fingerprint(materialize, ground):
    result = materialize("filtered_captions", overrides=["value=7"])
    (made,) = result.asset_materializations_for_node("filtered_captions")
    said = {name: value.value for name, value in made.metadata.items()}
    assert said["value"] == 7 and said["files"] == 1 and said["made_by_this_run"] is True
    assert said["white"].startswith("![white](data:image/png;base64,")
    assert said["loss"].startswith("![loss](data:image/svg+xml;base64,")
    assert said["seconds"] > 0 and "filter-captions --config" in said["command"]
    assert made.tags is not None and made.tags["dagster/data_version"].startswith(said["fingerprint"])
    assert checks(result) == {"counts_add_up": True, "captions_kept": True}


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("fail", "filter-captions failed: in.tsv:3: no tab between URL and caption"),
        ("crash", "filter-captions failed: ZeroDivisionError: a bug"),
        ("be killed", "filter-captions was killed by signal 9 (out of memory?); what is whole is kept"),
    ],
)
def test_a_failed_stage_says_why_in_one_line(materialize, ground, act, said):
    step = failure(materialize("filtered_captions", act))
    assert step.error.message.strip().endswith(said)
    assert "filter-captions on stderr" in step.user_failure_data.metadata["last_lines"].value
    assert not (ground.outputs / "filter-captions").exists()


def test_a_broken_promise_is_a_failed_check_and_no_materialization(materialize):
    result = materialize("filtered_captions", "break promise")
    assert checks(result) == {"counts_add_up": False, "captions_kept": False}
    assert "counts_add_up does not hold: found the opposite" in failure(result).error.message
    assert not result.asset_materializations_for_node("filtered_captions")


def test_a_stage_that_was_stopped_after_a_checkpoint_goes_on(materialize):
    result = materialize("filtered_captions", "stop once")
    assert result.success
    assert "STEP_UP_FOR_RETRY" in [event.event_type_value for event in result.all_events]


def test_an_unknown_setting_in_the_launchpad_is_named(materialize):
    step = failure(materialize("filtered_captions", overrides=["valu=7"]))
    assert "filter-captions.valu is not a setting of filter-captions. Did you mean value?" in step.error.message


@given(st.sets(st.integers(0, 99_999), min_size=1, max_size=50))
def test_partition_keys_reach_the_command_line_as_ranges(shards):
    assert parse_shards(shard_ranges([shard_key(shard) for shard in shards])) == sorted(shards)
