"""Profiles, overrides and fingerprints: what is refused, with which words, and what counts as a change."""

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from m2m.config import (
    Compute,
    Incidental,
    ModelSource,
    Profile,
    SourcePath,
    StageConfig,
    identity,
    load_profile,
    source_digest,
)
from m2m.errors import ConfigError, InputError


class Train(StageConfig):
    source: SourcePath
    model: ModelSource = "owner/name@rev"
    context_window: int = Field(default=4, ge=1)
    learning_rate: float = 1e-5
    workers: Annotated[int, Incidental()] = 1
    compute: Compute = Compute()


def profile_of(tmp_path: Path, text: str) -> Profile:
    (tmp_path / "configs").mkdir(exist_ok=True)
    (tmp_path / "captions.tsv").write_text("u\tc\n")
    file = tmp_path / "configs" / "small.yaml"
    file.write_text(text)
    return load_profile(file, known={"train": ["self", "dino"], "filter": []})


def test_variants_override_what_they_share(tmp_path):
    profile = profile_of(
        tmp_path,
        "train: {source: captions.tsv, learning_rate: 1e-3, compute: {threads: 1}, "
        "variants: {self: {context_window: 2, compute: {device: cuda}}}}",
    )
    config = profile.stage_config(Train, "train", "self", ["learning_rate=2e-4", "compute.dtype=bfloat16"])
    assert (config.context_window, config.learning_rate) == (2, 2e-4)
    assert config.compute == Compute(device="cuda", dtype="bfloat16", threads=1)
    assert profile.stage_config(Train, "train", "dino").context_window == 4


@pytest.mark.parametrize(
    "text, words",
    [
        ("train: {source: a, contxt_window: 2}", ["small.yaml: train.contxt_window", "Did you mean context_window?"]),
        ("train: {source: a, context_window: 0}", ["train.context_window", "greater than or equal to 1"]),
        ("train: {source: a, compute: {devise: cpu}}", ["train.compute.devise", "Did you mean device?"]),
        ("train: {learning_rate: 1}", ["train.source is missing"]),
    ],
)
def test_wrong_settings_are_named_with_a_way_out(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        profile_of(tmp_path, text).stage_config(Train, "train")
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("trian: {}", "trian is not a stage. Did you mean train?"),
        ("train: {variants: {slef: {}}}", "Did you mean self?"),
        ("train: 3", "must hold settings"),
        ("- a", "expected stages with their settings"),
        ("a: [", "not YAML"),
    ],
)
def test_a_malformed_profile_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        profile_of(tmp_path, text)


def test_a_missing_profile_names_those_there_are():
    with pytest.raises(ConfigError, match=r"There are: .*tiny"):
        load_profile("tinny")


def test_overrides_must_read_key_equals_value(tmp_path):
    with pytest.raises(ConfigError, match="key=value"):
        profile_of(tmp_path, "train: {source: a}").stage_config(Train, "train", overrides=["context_window"])


def test_identity_follows_content_and_ignores_names_and_incidentals(tmp_path):
    (tmp_path / "a.tsv").write_text("same")
    (tmp_path / "b.tsv").write_text("same")
    first = identity(Train(source=Path("a.tsv"), workers=1), tmp_path)
    assert first == identity(Train(source=Path("b.tsv"), workers=8), tmp_path)
    (tmp_path / "b.tsv").write_text("other")
    assert first != identity(Train(source=Path("b.tsv")), tmp_path)
    assert first != identity(Train(source=Path("a.tsv"), compute=Compute(threads=1)), tmp_path)
    assert first["model"] == "owner/name@rev"


def test_a_folder_is_known_by_its_files(tmp_path):
    (tmp_path / "m" / "sub").mkdir(parents=True)
    (tmp_path / "m" / "sub" / "w").write_text("1")
    before = source_digest("m", tmp_path)
    (tmp_path / "m" / "sub" / "w").write_text("2")
    assert source_digest("m", tmp_path) != before


def test_a_source_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"source nowhere\.tsv: no such file"):
        identity(Train(source=Path("nowhere.tsv")), tmp_path)
