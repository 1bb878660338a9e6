"""Curves as pictures: what their legends must be. What a report makes of them is in `test_report`."""

import re
import xml.etree.ElementTree as ElementTree

from m2m.evaluation.charts import picture

WAYS = ["", ", window of 4", ", window of 8 with 4 first", ", the first 4 alone"]
COLUMNS = {"n-th image": [1.0, 2.0]} | {f"{m}{w}": [0.1, 0.2] for m in ("M2M-Self", "M2M-DINO") for w in WAYS}


def test_eight_lines_have_eight_colours():
    assert len(set(re.findall(r'class="line"[^>]*stroke:([^"]+)"', picture("likeness", COLUMNS)))) == 8


def test_a_long_legend_takes_more_rows_and_the_picture_has_room_for_them():
    root = ElementTree.fromstring(picture("likeness", COLUMNS))
    left, top, width, height = map(float, root.attrib["viewBox"].split())
    rows = [text for text in root.iter("{http://www.w3.org/2000/svg}text") if len(text)]
    assert [entry.text for row in rows for entry in row] == list(COLUMNS)[1:]
    assert len(rows) > 2 and (left, width) == (0, 480) and height == 300 - top
    for row in rows:
        assert top < float(row.attrib["y"]) - 10
        said = "".join(entry.text or "" for entry in row)
        assert float(row.attrib["x"]) + 12 * len(row) + 6.4 * len(said) <= width


def test_a_short_legend_takes_one_row():
    root = ElementTree.fromstring(picture("loss", {"step": [1.0, 2.0], "M2M-Self": [1.0, 0.5]}))
    assert root.attrib["viewBox"] == "0 0 480 300"
