"""What the Ray launcher does before a cluster is asked; what it does there is in `test_ray`."""
# pyright: reportOptionalMemberAccess=false

import shlex
import subprocess
import sys
from pathlib import Path

import dagster as dg
from hypothesis import given
from hypothesis import strategies as st
from test_outcome import failure

from orchestration.definitions import build_defs
from orchestration.launchers.ray import RayLauncher, entrypoint

PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@given(checkout=PATHS, python=PATHS, launch=PATHS)
def test_whatever_paths_are_called_a_shell_takes_each_for_one_word(checkout, python, launch):
    line = entrypoint(Path(checkout), python, Path(launch))
    words = ["cd", str(Path(checkout)), "&&", "exec", python, "-m", "orchestration.launchers.ray_driver"]
    assert shlex.split(line) == [*words, str(Path(launch))]


def test_a_folder_with_spaces_and_quotes_is_entered(tmp_path):
    checkout = tmp_path / "a folder's $HOME; exit 3"
    driver = checkout / "orchestration" / "launchers" / "ray_driver.py"
    driver.parent.mkdir(parents=True)
    driver.write_text("import os, sys; print(os.getcwd(), sys.argv[1])")
    line = entrypoint(checkout, sys.executable, checkout / "launch.json")
    said = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, check=True).stdout
    assert said == f"{checkout} {checkout / 'launch.json'}\n"


def test_without_ray_the_step_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dagster_ray", None)
    job = build_defs(resource_overrides={"launcher": RayLauncher()}).resolve_job_def("m2m_pipeline")
    with dg.instance_for_test() as instance:
        asked = [dg.AssetKey("filtered_captions")]
        result = job.execute_in_process(asset_selection=asked, raise_on_error=False, instance=instance)
    assert "the launcher is ray, which needs `pip install 'm2m[ray]'`" in failure(result).error.message
