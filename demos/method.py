"""Draws docs/method.svg, the figure of the method. Run from anywhere; the same file comes out every time:

python demos/method.py [--out FILE]
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vqvae
from vqvae import UserError, exit_in_words, write_file

CODES = np.array([(0.0, 0.62), (0.62, 1.0), (0.35, 0.05), (1.0, 0.42), (0.5, 0.52)])  # the codebook, in two dimensions
Q = np.array([0.45, 0.62, 0.3, 0.52, 1.0])  # Q(s, k) of each code
CHOSEN, Z = 4, (0.63, 0.36)  # the code nearest to the encoder's output z
GREY = "#555555"
VARIABLE = {"fontsize": 14, "color": "black", "style": "italic"}
TITLE = {"fontsize": 12, "color": "black", "weight": "bold", "ha": "left"}


@dataclass
class Args:
    out: Path = Path(__file__).parents[1] / "docs" / "method.svg"  # where to draw; .png works too


def box(axes, x, y, width, height, words, color):
    style = "round,pad=0,rounding_size=6"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor="black"))
    axes.text(x + width / 2, y + height / 2, words, ha="center", va="center", fontsize=11)


def arrow(axes, *points):
    """A line through `points` that ends in an arrow."""
    for tail, head in zip(points[:-2], points[1:-1], strict=True):
        axes.plot(*zip(tail, head, strict=True), color="black", linewidth=1.2, solid_capstyle="butt")
    style = {"arrowstyle": "-|>,head_width=0.22,head_length=0.45", "color": "black", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=style | {"linewidth": 1.2})


def note(axes, x, y, words, **style):
    axes.text(x, y, words, **{"fontsize": 10, "color": GREY, "ha": "center", "va": "center"} | style)


def fit(axes):
    """Above: (s, a) -> encoder -> z -> the nearest of K codes -> k; k and s -> decoder -> a'."""
    note(axes, 10, 448, "Fit a quantizer, then replace every action of the dataset by its code k", **TITLE)
    note(axes, 30, 360, "s", **VARIABLE)
    note(axes, 30, 342, "state")
    note(axes, 30, 290, "a", **VARIABLE)
    note(axes, 30, 272, "action")
    box(axes, 110, 264, 100, 54, "encoder", "#dbe9f6")
    arrow(axes, (44, 290), (110, 290))
    arrow(axes, (44, 360), (75, 360), (75, 304), (110, 304))

    # The codebook: a plane with K points, z, and the way from z to the nearest of them.
    box(axes, 290, 228, 150, 126, "", "#f7f7f7")
    arrow(axes, (210, 290), (290, 290))
    note(axes, 250, 302, "z", **VARIABLE)
    points = np.array([308, 244]) + CODES * [112, 92]
    z = np.array([308, 244]) + np.array(Z) * [112, 92]
    for i, (x, y) in enumerate(points):
        axes.plot(x, y, "o", color=f"C{i}", markersize=11)
    axes.plot(*z, "kx", markersize=7, markeredgewidth=2)
    axes.plot(*zip(z, points[CHOSEN], strict=True), "k:", linewidth=1.2)
    note(axes, z[0] + 14, z[1] - 5, "z", **VARIABLE | {"fontsize": 11})
    note(axes, 365, 215, "codebook: the nearest of K codes")

    box(axes, 540, 264, 100, 54, "decoder", "#dbe9f6")
    arrow(axes, (440, 290), (540, 290))
    axes.plot(478, 305, "o", color=f"C{CHOSEN}", markersize=9)
    note(axes, 498, 305, "k", **VARIABLE)
    arrow(axes, (75, 360), (75, 384), (590, 384), (590, 318))
    note(axes, 330, 396, "the decoder sees the state too: one code means different actions in different states")
    arrow(axes, (640, 290), (706, 290))
    note(axes, 725, 290, "a′", **VARIABLE)
    note(axes, 725, 272, "near a")


def learn(axes):
    """Below: Q(s, .) over the K codes, and the decoder that turns the chosen one into an action."""
    note(axes, 10, 176, "Learn over K codes, and act by decoding one", **TITLE)
    note(axes, 30, 72, "s", **VARIABLE)
    note(axes, 30, 54, "state")
    box(axes, 110, 46, 100, 54, "Q network", "#fde7cf")
    arrow(axes, (44, 72), (110, 72))
    arrow(axes, (210, 72), (290, 72))
    box(axes, 290, 28, 150, 92, "", "#f7f7f7")
    for i, q in enumerate(Q):
        axes.bar(317 + 24 * i, 70 * q, width=16, bottom=38, color=f"C{i}")
    note(axes, 365, 14, "Q(s, k) of every code: a sum over actions has K terms, none of them a sample")
    arrow(axes, (440, 72), (540, 72))
    axes.plot(478, 87, "o", color=f"C{CHOSEN}", markersize=9)
    note(axes, 498, 87, "k", **VARIABLE)
    note(axes, 488, 54, "best, or\none drawn")
    box(axes, 540, 46, 100, 54, "decoder", "#dbe9f6")
    arrow(axes, (44, 72), (75, 72), (75, 140), (590, 140), (590, 100))
    arrow(axes, (640, 72), (706, 72))
    note(axes, 725, 72, "a", **VARIABLE)
    note(axes, 725, 54, "to act")


def main():
    args = tyro.cli(Args, description=__doc__)
    if args.out.suffix not in (".svg", ".png"):
        raise UserError(f"the figure is an .svg or a .png file, not {args.out}.")
    # Text stays text, and nothing in the file depends on the time or on random numbers.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "method", "font.family": "sans-serif"})
    matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans", "Verdana", "Arial"]  # a browser takes the first it has
    figure = Figure(figsize=(7.6, 4.6), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 760), ylim=(0, 460))
    axes.set_axis_off()
    fit(axes)
    learn(axes)
    kind = args.out.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else None
    write_file(args.out, lambda file: figure.savefig(file, format=kind, metadata=metadata, dpi=110))


if __name__ == "__main__":
    exit_in_words(main)
