"""Draws measurements as SVG or PNG, according to the file's suffix. Needs matplotlib: the extra `plot`.

The same numbers give the same file, text in an SVG stays text, and a file appears whole or not at all.
"""

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llamajax.errors import LlamaJaxError
from llamajax.files import new_file

_SUFFIXES = (".svg", ".png")


class Point(NamedTuple):
    """A quantized model on the curve of quality against size.

    Attributes:
        family: points of one family share a colour and a line.
        label: written beside the point.
        bits_per_weight: size of everything that is stored, per weight.
        kl_divergence: KL divergence from the reference, in nats per token.
    """

    family: str
    label: str
    bits_per_weight: float
    kl_divergence: float


class Speed(NamedTuple):
    """The measured speed of one kind of work.

    Attributes:
        label: written beside the bar.
        tokens_per_second: the length of the bar.
        limit: tokens per second that the machine allows.
    """

    label: str
    tokens_per_second: float
    limit: float


def check_picture(path: str | Path) -> None:
    """Checks, before any work, that a picture can be drawn.

    Raises:
        LlamaJaxError: for a suffix other than .svg or .png, a folder that does not exist, or without matplotlib.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise LlamaJaxError(f"{path}: unknown kind of picture: expected a name that ends in {' or '.join(_SUFFIXES)}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise LlamaJaxError(f"{path}: cannot be written: expected a file name in a folder that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise LlamaJaxError("drawing needs matplotlib: pip install 'llamajax[plot]'")


def quality_curve(points: Iterable[Point], path: str | Path) -> None:
    """Draws KL divergence on a logarithmic axis against bits per weight; each point has its label.

    A family's line joins its Pareto-optimal points. A point without divergence has no place on the logarithmic axis
    and is listed in the legend.

    Raises:
        LlamaJaxError: as `check_picture`.
    """
    check_picture(path)
    axes = _axes()
    points = list(points)
    _draw_curve(axes, points, _families(points))
    _save(axes.figure, path)


def quality_panels(panels: Mapping[str, Iterable[Point]], path: str | Path) -> None:
    """Draws the `quality_curve` of several models side by side, under their names; a family has one colour in all.

    Raises:
        LlamaJaxError: as `check_picture`.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    drawn = {name: list(points) for name, points in panels.items()}
    families = _families([point for points in drawn.values() for point in points])
    figure = Figure(figsize=(7 * max(1, len(drawn)), 5), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        axes.grid(alpha=0.3, which="both")
        axes.set_title(_literal(name))
        _draw_curve(axes, points, families)
    _save(figure, path)


def _families(points: Sequence[Point]) -> tuple[str, ...]:
    """The families in the order of their first points, which determines their colours."""
    return tuple(dict.fromkeys(point.family for point in points))


def _draw_curve(axes: Any, points: Sequence[Point], families: Sequence[str]) -> None:
    """Draws what `quality_curve` describes on `axes`."""
    for i, family in enumerate(families):
        members = sorted(point[2:] for point in points if point.family == family and point.kl_divergence > 0)
        if members:
            best = [point for k, point in enumerate(members) if all(point[1] < other[1] for other in members[:k])]
            axes.plot(*zip(*best, strict=True), color=f"C{i}", linewidth=1.2, alpha=0.7)
            axes.plot(*zip(*members, strict=True), "o", color=f"C{i}", label=_literal(family))
    for point in points:
        if point.kl_divergence <= 0:
            axes.plot([], [], " ", label=f"{_literal(point.label)}: {point.bits_per_weight:.2f} bits, no divergence")
    axes.margins(x=0.1)  # room for labels
    axes.set(xlabel="bits a weight", ylabel="KL divergence from the reference, nats a token", yscale="log")
    axes.legend()
    _write_labels(axes, [point for point in points if point.kl_divergence > 0])


def error_by_layer(
    layers: Sequence[float], logits: float, weights: Mapping[str, Sequence[float]], path: str | Path
) -> None:
    """Draws signal-to-noise ratios by layer: of the residual stream, and of the layers' weights.

    A weight without error in any layer (infinite dB) is not drawn.

    Args:
        layers: ratio of the residual stream after each layer, in dB.
        logits: ratio of the logits, drawn after the last layer.
        weights: ratios of each weight by name, one per layer; each weight is a line.
        path: file of the picture.

    Raises:
        LlamaJaxError: as `check_picture`.
    """
    check_picture(path)
    from matplotlib.ticker import MaxNLocator

    axes = _axes()
    for name, values in weights.items():
        if any(map(math.isfinite, values)):
            axes.plot(values, ".-", linewidth=0.8, alpha=0.7, label=f"weight {name}")
    axes.plot(layers, "o-", color="black", linewidth=2, label="residual stream")
    axes.plot([len(layers)], [logits], "D", color="black", label="logits")
    axes.set(xlabel="layer", ylabel="signal to noise, dB (higher is better)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(axes.figure, path)


def speed_bars(title: str, speeds: Sequence[Speed], path: str | Path) -> None:
    """Draws a bar for each kind of work, the first at the top, with a mark at the machine's limit.

    Raises:
        LlamaJaxError: as `check_picture`.
    """
    check_picture(path)
    axes = _axes()
    labels = [speed.label for speed in speeds]
    bars = axes.barh(labels, [speed.tokens_per_second for speed in speeds], label="measured")
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    style: dict[str, Any] = {"color": "black", "markersize": 16, "markeredgewidth": 2}
    axes.plot([speed.limit for speed in speeds], labels, "|", **style, label="limit of memory and products in floats")
    axes.margins(x=0.1)  # room for labels
    axes.invert_yaxis()
    axes.set(title=_literal(title), xlabel="tokens per second, of all rows")
    axes.set_xlim(left=0)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    _save(axes.figure, path)


def _literal(name: str) -> str:
    """Escapes a name for matplotlib: $ would begin a formula, and a leading underscore would hide it in legends."""
    name = name.replace("$", r"\$")
    return f"\u200b{name}" if name.startswith("_") else name


def _axes() -> Any:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    axes.grid(alpha=0.3, which="both")
    return axes


def _write_labels(axes: Any, points: Sequence[Point]) -> None:
    """Writes each label at the first place around its point where it covers no point and no other label."""
    axes.figure.draw_without_rendering()
    legend = axes.get_legend()
    taken = [legend.get_window_extent()] if legend else []
    drawn = [axes.transData.transform(point[2:]) for point in points]
    sides = ((8, 0, "left"), (-8, 0, "right"), (0, 11, "center"), (0, -11, "center"), (7, 9, "left"), (-7, -9, "right"))
    places = [(reach * x, reach * y, side) for reach in (1, 2) for x, y, side in sides]
    for point in points:
        for x, y, side in places:
            style: dict[str, Any] = {"ha": side, "va": "center", "fontsize": 8}
            text = axes.annotate(_literal(point.label), point[2:], (x, y), textcoords="offset points", **style)
            box = text.get_window_extent().padded(4)  # pixels, about the size of a point
            if not any(box.overlaps(other) for other in taken) and not any(box.contains(*place) for place in drawn):
                break
            if (x, y, side) != places[-1]:
                text.remove()
        taken.append(box)


def _save(figure: Any, path: str | Path) -> None:
    """Saves a figure: writes a temporary file, then renames it."""
    import matplotlib

    path = Path(path)
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with new_file(path) as partial, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llamajax"}):
        figure.savefig(partial, metadata=metadata)
