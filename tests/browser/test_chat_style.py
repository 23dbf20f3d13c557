"""The colours of the pages can be told apart, in both themes (WCAG 2: 4.5 for text, 3 for edges). No browser."""

from __future__ import annotations

import re

import pytest

from tael.serve.pages.frame import STATIC

CSS = (STATIC / "tael.css").read_text(encoding="utf-8")
PAIRS = dict(re.findall(r"--([\w-]+): (light-dark\(#\w{6}, #\w{6}\))", CSS))
CODE = re.findall(r"^\.code \.\w.*?color: (light-dark\(#\w{6}, #\w{6}\))", CSS, re.MULTILINE)


def colours(pair: str) -> tuple[str, str]:
    light, dark = re.findall(r"#(\w{6})", pair)
    return light, dark


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


TEXT = [(ink, ground) for ink in ("ink", "faint", "accent") for ground in ("paper", "surface", "sunk", "tint")]
TEXT += [("bad", "bad-soft"), ("bad", "surface"), ("on-accent", "accent")]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ink, ground", TEXT)
def test_text_can_be_read(ink, ground, theme):
    assert contrast(colours(PAIRS[ink])[theme], colours(PAIRS[ground])[theme]) >= 4.5


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_edges_of_fields_and_colours_of_code_can_be_seen(theme):
    for ground in ("paper", "surface"):
        assert contrast(colours(PAIRS["edge"])[theme], colours(PAIRS[ground])[theme]) >= 3
    assert len(CODE) >= 6
    for colour in CODE:
        assert contrast(colours(colour)[theme], colours(PAIRS["sunk"])[theme]) >= 4.5
