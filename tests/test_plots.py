"""Pictures contain what they were given, as text; without matplotlib, an error says what to install."""

import importlib.util
import math
import xml.etree.ElementTree
from pathlib import Path

import pytest

from llamajax import LlamaJaxError
from llamajax.evaluation.plots import (
    Point,
    Speed,
    check_picture,
    error_by_layer,
    quality_curve,
    quality_panels,
    speed_bars,
)

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="no matplotlib: pip install 'llamajax[plot]'"
)

POINTS = [
    Point("rounding", "int8", 8.5, 1e-5),
    Point("rounding", "int4-g32", 4.5, 2e-3),
    Point("code book", "nf4-g64", 4.25, 2.1e-3),
    Point("code book", "float", 16, 0.0),
]
LAYERS = {"attention.query_DQ": [21.0, 22.0], "ffn_norm.weight_D": [math.inf, math.inf]}


def texts(path: Path) -> set[str]:
    """Returns all text of an SVG."""
    tree = xml.etree.ElementTree.parse(path)
    assert tree.getroot().tag == "{http://www.w3.org/2000/svg}svg"
    return {"".join(node.itertext()).strip() for node in tree.iter("{http://www.w3.org/2000/svg}text")}


@needs_matplotlib
def test_quality_curve(tmp_path: Path) -> None:
    quality_curve(POINTS, tmp_path / "curve.svg")
    seen = texts(tmp_path / "curve.svg")
    assert {"int8", "int4-g32", "nf4-g64", "rounding", "code book", "bits a weight"} <= seen
    assert "float: 16.00 bits, no divergence" in seen and "KL divergence from the reference, nats a token" in seen
    quality_curve(POINTS[-1:], tmp_path / "nothing.svg")
    assert "float: 16.00 bits, no divergence" in texts(tmp_path / "nothing.svg")


def colours(path: Path) -> list[str]:
    """Returns the stroke colours of all lines and points of an SVG."""
    tree = xml.etree.ElementTree.parse(path)
    styles = [node.get("style", "") for node in tree.iter("{http://www.w3.org/2000/svg}path")]
    return [style.partition("stroke: ")[2][:7] for style in styles]


@needs_matplotlib
def test_quality_panels(tmp_path: Path) -> None:
    """A family keeps its colour in a panel where it is alone."""
    quality_panels({"box": POINTS, "smollm2": POINTS[2:3]}, tmp_path / "panels.svg")
    assert {"box", "smollm2", "int8", "int4-g32", "nf4-g64"} <= texts(tmp_path / "panels.svg")
    quality_panels({"smollm2": POINTS[2:3]}, tmp_path / "alone.svg")
    of_rounding, of_code_book = "#1f77b4", "#ff7f0e"
    assert {of_rounding, of_code_book} <= set(colours(tmp_path / "panels.svg"))
    both = [colours(tmp_path / f"{name}.svg").count(of_rounding) for name in ("panels", "alone")]
    quality_curve(POINTS, tmp_path / "curve.svg")
    assert both[0] == colours(tmp_path / "curve.svg").count(of_rounding) and both[1] > 0


@needs_matplotlib
def test_error_by_layer(tmp_path: Path) -> None:
    error_by_layer([20.0, 19.0], 18.0, LAYERS, tmp_path / "layers.svg")
    seen = texts(tmp_path / "layers.svg")
    assert {"layer", "residual stream", "logits", "weight attention.query_DQ"} <= seen
    assert "weight ffn_norm.weight_D" not in seen, "weights without error are not drawn"
    error_by_layer([math.inf, math.inf], math.inf, {}, tmp_path / "equal.svg")
    assert "residual stream" in texts(tmp_path / "equal.svg")


@needs_matplotlib
def test_png_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg", "one.png"):
        error_by_layer([20.0, 19.0], 18.0, LAYERS, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.png", "one.svg", "two.svg"]


@needs_matplotlib
def test_a_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def full_disk(self, path, **options):
        Path(path).write_text("<svg")
        raise OSError(28, "No space left on device")

    picture = tmp_path / "curve.svg"
    picture.write_text("old")
    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(LlamaJaxError, match="curve.svg: cannot be written .No space left on device.: make room"):
        quality_curve(POINTS, picture)
    assert [file.name for file in tmp_path.iterdir()] == ["curve.svg"] and picture.read_text() == "old"


@needs_matplotlib
def test_refused_names(tmp_path: Path) -> None:
    with pytest.raises(LlamaJaxError, match="curve.pdf: unknown kind of picture: expected .* .svg or .png"):
        check_picture("curve.pdf")
    with pytest.raises(LlamaJaxError, match="cannot be written: expected a file name in a folder that exists"):
        check_picture(tmp_path / "nowhere" / "curve.svg")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(LlamaJaxError, match="cannot be written"):
        quality_curve(POINTS, tmp_path / "folder.svg")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    for draw in (
        lambda path: check_picture(path),
        lambda path: quality_curve(POINTS, path),
        lambda path: error_by_layer([20.0], 18.0, {}, path),
    ):
        with pytest.raises(LlamaJaxError, match=r"matplotlib: pip install 'llamajax\[plot\]'"):
            draw(tmp_path / "picture.svg")
    assert list(tmp_path.iterdir()) == []


@needs_matplotlib
def test_names_are_no_formulas(tmp_path: Path) -> None:
    """matplotlib would parse text between dollars as a formula, and omit labels with a leading `_` from a legend."""
    points = [Point("_$a_$ $", "in$t_{4$", 4.5, 1e-3), Point("_$a_$ $", "_none$", 16, 0.0)]
    quality_curve(points, tmp_path / "curve.svg")
    seen = {text.strip("\u200b") for text in texts(tmp_path / "curve.svg")}
    assert {"_$a_$ $", "in$t_{4$", "_none$: 16.00 bits, no divergence"} <= seen
    speed_bars("cost: $5 for $x_{", [Speed("decode", 2.0, 3.0)], tmp_path / "speed.svg")
    assert "cost: $5 for $x_{" in texts(tmp_path / "speed.svg")
