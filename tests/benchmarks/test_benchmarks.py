"""Benchmarks run and end with a line that machines can read; what they measure is too small here to be judged."""

import importlib
import json

import pytest
import torch

import benchmarks.models
from benchmarks.__main__ import DATA, EVALUATION, PAPER_SIZE, SMALL
from benchmarks.measuring import Machine, Report

STAND_IN = benchmarks.models.SMALL_UNET | {"cross_attention_dim": 1024}
SMALLER = {"_STEPS": 4, "_SETS": 1, "_TOKENS": 64, "_SIDE": 16}


@pytest.mark.parametrize("name", [*SMALL, *PAPER_SIZE])
def test_a_benchmark_ends_with_its_figures(monkeypatch, capsys, name):
    monkeypatch.setattr(benchmarks.models, "SD21_BASE_UNET", STAND_IN)
    monkeypatch.setattr("sys.argv", [name, "--repeats", "0"])
    module = importlib.import_module(f"benchmarks.{name}")
    for size, smaller in SMALLER.items():
        if hasattr(module, size):
            monkeypatch.setattr(module, size, smaller)
    code = module.main()
    ended = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ended["name"] == name
    assert ended["figures"].keys() >= ended["reach"].keys() > set()
    assert ended["ok"] == (code == 0)
    if name in ("cached_context", "training_pass", "int8_context", "gradient_checkpointing"):
        assert ended["ok"], ended  # exactness does not depend on the machine


def test_speed_of_training_is_that_of_the_real_loop(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training_speed", "--dtype", "float32"])
    module = importlib.import_module("benchmarks.training_speed")
    monkeypatch.setattr(module, "_STEPS", 2)
    monkeypatch.setattr(module, "_BOTH", ("self",))
    monkeypatch.setattr(module, "_KERNELS", {"channels last": {"channels_last": True}})
    assert module.main() == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert len([name for name in figures if name.endswith("sets per second")]) == 2
    assert all(value > 0 for value in figures.values())


@pytest.mark.parametrize(
    "name, argv",
    [
        ("captions", ["--captions", "600", "--fuzzed", "300", "--rows", "0"]),
        ("reads", ["--sets", "100", "--passes", "1"]),
        ("waiting", ["--sets", "20", "--workers", "1"]),
        ("generation", ["--sets", "2", "--images", "2", "--steps", "1"]),
    ],
)
def test_a_benchmark_of_data_ends_with_its_figures(monkeypatch, capsys, name, argv):
    monkeypatch.setattr("sys.argv", [name, *argv])
    code = importlib.import_module(f"benchmarks.{name}").main()
    ended = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert name in DATA and ended["name"] == name and ended["ok"] == (code == 0)
    assert ended["figures"].keys() >= ended["reach"].keys() > set()
    assert not ended["figures"].get("differences") and not ended["figures"].get("fuzzed_differences")


@pytest.mark.parametrize("name, argv", [("evaluation_numbers", []), ("evaluation_gate", ["--rounds", "20"])])
def test_a_benchmark_of_the_evaluation_reaches_what_it_promises(monkeypatch, capsys, name, argv):
    monkeypatch.setattr("sys.argv", [name, *argv])
    module = importlib.import_module(f"benchmarks.{name}")
    if name == "evaluation_gate":
        monkeypatch.setattr(module, "_SHARES", {"sets_differ_most": 0.16})
    module.main()
    ended = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert name in EVALUATION and ended["name"] == name and ended["ok"], ended


def test_a_report_falls_short_where_a_figure_does(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["any"])
    report = Report("any", Machine.asked_for(__doc__))
    report.at_most("small", 1.0, 2.0)
    report.at_least("not judged", 1.0, 2.0, judged=False)
    assert report.ok
    report.at_least("large", 1.0, 2.0)
    assert report.close() == 1
    assert "NOT REACHED" in capsys.readouterr().out


def test_memory_is_counted_however_often_it_was_taken_and_freed_before(monkeypatch):
    """Freed memory that stays with the process would make whatever is measured second look small."""
    monkeypatch.setattr("sys.argv", ["any"])
    machine = Machine.asked_for(__doc__)
    megabytes = [machine.extra_bytes(lambda: len([torch.ones(2**20) for _ in range(20)])) / 2**20 for _ in range(3)]
    assert megabytes == pytest.approx([80] * 3, rel=0.1)
