"""Contact sheets: every image where it belongs, whatever its size and kind."""

import numpy as np
import pytest
import torch
from PIL import Image

from m2m.pictures import contact_sheet


def test_images_lie_in_rows():
    red = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    red[:, 0] = 255
    blue = np.zeros((100, 50, 3), np.uint8)
    blue[..., 2] = 255
    sheet = contact_sheet([red, [blue, Image.new("L", (10, 10), 7), red[0]]], ["two of red", "x" * 500], cell=64)
    pixels = np.asarray(sheet)
    header = 18
    assert sheet.size == (3 * 66 + 2, 2 * (header + 66) + 2)
    assert pixels[2 + header + 32, 2 + 32].tolist() == [255, 0, 0]
    assert pixels[2 + header + 32, 2 + 2 * 66 + 32].tolist() == [255, 255, 255]
    second = 2 + (header + 66) + header + 32
    assert pixels[second, 2 + 16].tolist() == [0, 0, 255] and pixels[second, 2 + 50].tolist() == [255, 255, 255]
    assert pixels[second, 2 + 66 + 32].tolist() == [7, 7, 7]
    assert (pixels[:header, :150] < 200).any()  # the caption


def test_sheets_are_the_same_every_time():
    drawn = torch.randint(0, 255, (3, 3, 20, 20), dtype=torch.uint8)
    assert contact_sheet([drawn], ["c"]).tobytes() == contact_sheet([list(drawn)], ["c"]).tobytes()


@pytest.mark.parametrize(
    "rows, captions",
    [([], None), ([[]], None), ([[torch.zeros(3, 4, 4)]], None), ([torch.zeros(1, 3, 4, 4).byte()], [])],
)
def test_what_is_no_sheet(rows, captions):
    with pytest.raises(ValueError):
        contact_sheet(rows, captions)
