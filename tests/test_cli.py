"""The command line: what users type wrong, and what they are told."""

import pytest

from m2m.arguments import parse_shards
from m2m.cli import main


def test_shards_are_numbers_and_ranges():
    assert parse_shards("0-3,7") == [0, 1, 2, 3, 7]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["filter-captions", "--config", "nowhere"], "no such profile. There are:"),
        (
            ["filter-captions", "max_tokns=3"],
            "tiny.yaml: filter-captions.max_tokns is not a setting of filter-captions",
        ),
        (["filter-captions", "max_tokns=3"], "Did you mean max_tokens?"),
        (["filter-captions", "max_tokens=many"], "filter-captions.max_tokens"),
        (["filter-captions", "max_tokens"], "key=value"),
        (["trace", "reprot"], "There are: filter-captions"),
    ],
)
def test_wrong_input_ends_with_one_clear_line(argv, words, capsys):
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and "Traceback" not in said


def test_a_missing_variant_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain"])
    assert "--variant" in capsys.readouterr().err


def test_inputs_that_are_not_made_yet_name_their_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("M2M_OUTPUTS", str(tmp_path))
    assert main(["generate-sets"]) == 2
    assert "python -m m2m filter-captions --config" in capsys.readouterr().err
