"""The images of README and docs: fresh, well-formed, and the same on light and dark pages but for their colors."""

import re
from xml.etree import ElementTree

from tools.draw_images import DARK, IMAGES, LIGHT, draw_architecture, draw_layer_speed, images


def test_committed_images_are_fresh() -> None:
    drawn = {path.name: content for path, content in images()}
    committed = {path.name: path.read_text(encoding="utf-8") for path in IMAGES.glob("*.svg")}
    assert committed == drawn, "run `python -m tools.draw_images` and commit docs/images"


def test_themes_differ_in_colors_alone() -> None:
    for draw in (draw_architecture, draw_layer_speed):
        light, dark = draw(LIGHT), draw(DARK)
        assert light != dark
        assert re.sub("#[0-9a-f]{6}", "#", light) == re.sub("#[0-9a-f]{6}", "#", dark)
        ElementTree.fromstring(light)


def test_the_figure_shows_the_committed_result() -> None:
    texts = [element.text for element in ElementTree.fromstring(draw_layer_speed(LIGHT)).iter() if element.text]
    assert "forward, 1 token" in texts and "forward+backward, 2048 tokens" in texts
    assert sum(bool(re.fullmatch(r"\d\.\d\d", text)) for text in texts) == 10
