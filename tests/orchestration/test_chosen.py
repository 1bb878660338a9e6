"""Which launcher runs the stages is said by one variable, and a wrong one is named."""

import pytest

from m2m.errors import ConfigError
from orchestration.launchers.chosen import chosen_launcher
from orchestration.launchers.local import LocalLauncher
from orchestration.launchers.slurm import SlurmLauncher


def test_it_is_local_unless_said_otherwise(monkeypatch):
    monkeypatch.delenv("M2M_LAUNCHER", raising=False)
    assert isinstance(chosen_launcher(), LocalLauncher)
    monkeypatch.setenv("M2M_LAUNCHER", "slurm")
    assert isinstance(chosen_launcher(), SlurmLauncher)


def test_a_file_says_its_settings(tmp_path):
    (tmp_path / "c.yaml").write_text("launcher: slurm\npartition: a100\nsbatch: [--constraint=80gb]\n")
    launcher = chosen_launcher(str(tmp_path / "c.yaml"))
    assert isinstance(launcher, SlurmLauncher)
    assert (launcher.partition, launcher.sbatch) == ("a100", ["--constraint=80gb"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("partition: a100", "must say `launcher: NAME`"),
        ("launcher: slrm", "slrm is not a launcher. There are: local, slurm, kubernetes, ray"),
        ("launcher: kubernetes\nnamespace: m2m", "kubernetes needs image (with this package"),
        ("launcher: kubernetes\nimage: m2m\nnode_selectors: {}", "Did you mean node_selector?"),
        ("launcher: ray\nadress: http://head:8265", "adress is not a setting of ray. Did you mean address?"),
        ("launcher: slurm\npartitoin: a100", "partitoin is not a setting of slurm. Did you mean partition?"),
        ("launcher: slurm\nshards_per_task: 0", "shards_per_task: Input should be greater than or equal to 1"),
        ("a: [", "can't be read"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, reason):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml") as error:
        chosen_launcher(str(tmp_path / "c.yaml"))
    assert reason in str(error.value)
