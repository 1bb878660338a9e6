"""Stages as jobs of a real Ray cluster on loopback (`services/ray/up.sh`)."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

import sys
from pathlib import Path

import pytest
from ray_ground import RayPlace, needs_ray, ray_place
from test_outcome import checks, failure
from toy_ground import Ground

pytestmark = needs_ray


@pytest.fixture
def place(ground, tmp_path, monkeypatch):
    folder = tmp_path / "a folder's name"  # which a shell would take for three words and a quotation
    folder.mkdir()
    for name in ("configs", "dagster"):
        (ground.folder / name).rename(folder / name)
    with ray_place(Ground(folder), monkeypatch) as place:
        yield place


def test_a_stage_is_a_job_and_what_it_says_is_heard(place: RayPlace):
    result = place.run()
    assert result.success and checks(result) == {"counts_add_up": True, "captions_kept": True}
    (made,) = result.asset_materializations_for_node("filtered_captions")
    assert made.metadata["white"].value.startswith("![white](data:image/png;base64,")
    assert "filter-captions on stderr" in (Path(made.metadata["ray_files"].value) / "0.err").read_text()
    (job,) = place.jobs()
    assert made.metadata["ray_job"].value == job.submission_id


def test_a_range_of_shards_is_one_job_of_a_task_each(place: RayPlace):
    place.make_here("filter-captions")
    result = place.run("mis_shards")
    assert result.success and all(checks(result).values())
    assert len(result.asset_materializations_for_node("mis_shards")) == 3
    assert (place.outputs / "generate-sets" / "manifest.json").exists()
    (job,) = place.jobs()
    assert len(list(Path(job.metadata["m2m_folder"]).glob("*.messages"))) == 3


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("fail", "filter-captions failed: in.tsv:3: no tab between URL and caption"),
        ("be killed", "filter-captions was killed by signal 9"),
    ],
)
def test_a_failed_stage_says_why_and_is_not_tried_again(place: RayPlace, act, said):
    assert said in failure(place.run(act=act)).error.message
    assert len(place.jobs()) == 1


def test_a_training_of_several_processes_is_one_job_and_each_is_told_its_place(place: RayPlace):
    """The toy does not train together; the real stage does in `test_ray_real_stages`."""
    place.ask_for(nodes=2, gpus=2, cpus=2, memory_gb=1)
    show = (
        "import os, sys; e = os.environ; "
        "print('rank', e['RANK'], 'of', e['WORLD_SIZE'], 'GPUs', e['CUDA_VISIBLE_DEVICES'], file=sys.stderr)"
    )
    place.run(command=[sys.executable, "-c", show])
    (job,) = place.jobs()
    files = [Path(job.metadata["m2m_folder"]) / f"{node}.err" for node in range(2)]
    said = [sorted(file.read_text().splitlines()) for file in files]
    assert [[line.partition(" GPUs")[0] for line in lines] for lines in said] == [
        ["rank 0 of 4", "rank 1 of 4"],
        ["rank 2 of 4", "rank 3 of 4"],
    ]
    assert all(line.rpartition(" ")[2].count(",") == 1 for lines in said for line in lines)


@pytest.mark.parametrize(
    ("settings", "asked", "said", "way_out"),
    [
        ({}, {"gpus": 64}, "asks for 1 node(s) of 1 CPUs, 64 GPUs, 1 GB", "Set filter-captions.resources"),
        ({}, {"nodes": 9}, "asks for 9 node(s)", "autoscaling where nodes are still to come"),
        (
            {"gpu_types": {"a100": {"accelerator_type:A100": 0.001}}},
            {"gpu_type": "a100"},
            "0.001 accelerator_type:A100; the Ray cluster has 8 CPUs, 8 GPUs, 7 GB, 0 accelerator_type:A100",
            "the launcher's gpu_types",
        ),
        ({"python": "/nowhere/python"}, {}, "the head node can't start the job", "set the launcher's python"),
        ({"command": ["/nowhere/python", "-m", "m2m"]}, {}, "can't start /nowhere/python: No such file", "python"),
        ({"runtime_env": {"working_dir": "s3://nowhere/x.zip"}}, {}, "", "Set the launcher's runtime_env"),
        ({"runtime_env": {"nonsense": 1, "pip": 3}}, {}, "Ray refuses the job", "Set the launcher's runtime_env"),
        ({"address": "http://127.0.0.1:9"}, {}, "Ray does not answer at http://127.0.0.1:9: Failed to", "address"),
        ({"address": "127.0.0.1:nine"}, {}, "Ray does not answer at 127.0.0.1:nine", "Set the launcher's address"),
    ],
)
def test_what_is_set_wrongly_is_said_at_launch_and_not_tried_again(place: RayPlace, settings, asked, said, way_out):
    place.ask_for(**{"memory_gb": 1, **asked})
    result = place.run(**settings)
    message = failure(result).error.message
    assert said in message and way_out in message
    assert not [event for event in result.all_events if event.is_step_up_for_retry]


def test_the_address_in_the_surroundings_comes_before_the_launchers_own(place: RayPlace):
    """So Ray has it, and the error must name the one that was asked."""
    place.monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    assert "Ray does not answer at http://127.0.0.1:9" in failure(place.run()).error.message
    place.monkeypatch.delenv("RAY_ADDRESS")
