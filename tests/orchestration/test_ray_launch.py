"""What the Ray launcher does before a cluster is asked; what it does there is in `test_ray`."""
# pyright: reportOptionalMemberAccess=false

import _thread
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import pytest
from beside import beside
from hypothesis import given
from hypothesis import strategies as st
from test_jobs_end_to_end import wait_for
from test_outcome import failure

from orchestration.definitions import build_defs
from orchestration.launchers.ray import RayLauncher, entrypoint
from orchestration.launchers.ray_driver import work

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
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # or it is found elsewhere
    said = subprocess.run(["/bin/sh", "-c", line], env=bare, capture_output=True, text=True, check=True).stdout
    assert said == f"{checkout} {checkout / 'launch.json'}\n"


def test_without_ray_the_step_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dagster_ray", None)
    job = build_defs(resource_overrides={"launcher": RayLauncher()}).resolve_job_def("m2m_pipeline")
    with dg.instance_for_test() as instance:
        asked = [dg.AssetKey("filtered_captions")]
        result = job.execute_in_process(asset_selection=asked, raise_on_error=False, instance=instance)
    assert "the launcher is ray, which needs `pip install 'm2m[ray]'`" in failure(result).error.message


SAVES_FOR_A_WHILE = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1.5)
    pathlib.Path("saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path("begun").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("first", ["by a file", "by Ray"])
def test_a_command_that_is_asked_to_end_may_save_however_often_it_is_asked(tmp_path, first):
    def ask():
        wait_for((tmp_path / "begun").exists)
        if first == "by a file":
            (tmp_path / "stop").touch()
        for _ in range(2):  # Ray's cancel, as it comes to a task
            _thread.interrupt_main()
            time.sleep(0.5)

    with beside(ask):
        command = [sys.executable, "-c", SAVES_FOR_A_WHILE]
        code = work(command, {}, str(tmp_path), str(tmp_path / "0.out"), str(tmp_path / "0.err"))
    assert code == 75 and (tmp_path / "saved").exists()
