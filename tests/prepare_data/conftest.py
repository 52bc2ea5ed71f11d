"""A folder of images."""

import pytest
from preparing import noise


@pytest.fixture
def photos(tmp_path):
    """Nine readable images in a tree, of several shapes and names."""
    folder = tmp_path / "photos"
    names = ["b.png", "a/ü 中文 .png", "a/c.PNG", "a/b/d.png", "z.png", "e.png", "f.png", "g.png", "h.png"]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(i, 40 + 4 * i, 40).save(folder / name)
    return folder
