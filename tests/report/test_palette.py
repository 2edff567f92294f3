"""Colors are distinguishable, also for color-blind readers, and visible on white and on dark pages."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hqlt.report.palette import GREY, MODELS, PALETTE

SEEN = {
    "all": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}
"""Transforms of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1)."""
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour):
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """Convert linear RGB to CIE L*a*b*."""
    x, y, z = np.cbrt((XYZ @ np.clip(rgb, 0, 1)) / XYZ.sum(axis=1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one, other):
    """The contrast ratio of WCAG 2."""
    darker, lighter = sorted(XYZ[1] @ linear(colour) for colour in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("seen", SEEN)
def test_colors_are_distinguishable(seen):
    """Their distance is at least seven times the just noticeable difference."""
    colours = {colour: lab(SEEN[seen] @ linear(colour)) for colour in PALETTE}
    for one, other in itertools.combinations(PALETTE, 2):
        assert np.linalg.norm(colours[one] - colours[other]) > 16, (one, other)


@pytest.mark.parametrize("page", ["#ffffff", "#171717"])
def test_lines_are_visible_on_a_page(page):
    """Black is excluded, because a page replaces it by its text color."""
    for colour in {*PALETTE, GREY} - {"#000000"}:
        assert contrast(colour, page) > 2.2, colour


def test_models_have_colors_of_the_palette():
    assert set(MODELS.values()) < set(PALETTE)
