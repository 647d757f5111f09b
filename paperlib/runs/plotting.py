"""One style for every figure, and grids of images on a fixed grey scale.

seaborn and matplotlib are imported on use, since a test or a training needs neither.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]

WIDTH = 7.0  # inches: one column of a notebook or a paper

STYLE = dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 9)
STYLE |= dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 8)
STYLE |= {"legend.frameon": False, "figure.dpi": 100, "savefig.dpi": 150, "figure.constrained_layout.use": True}
# seaborn's "colorblind" palette: blue, orange, green, vermilion, purple, brown, pink, grey, yellow, sky blue
PALETTE = (
    "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc",
    "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9",
)  # fmt: skip
BLUE, ORANGE, GREEN, RED, GREY = (PALETTE[k] for k in (0, 1, 2, 3, 7))


def new(columns: int = 1, rows: int = 1, *, width: float = WIDTH, height: float = 3.0, **options: Any) -> Any:
    """`matplotlib.pyplot.subplots` with its `options` in the house style; `width` and `height` in inches."""
    import seaborn
    from matplotlib import pyplot

    seaborn.set_theme(context="paper", style="ticks", palette=PALETTE, rc=STYLE)
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), **options)
    for axis in np.ravel(axes):
        seaborn.despine(ax=axis)
    return figure, axes


def sheet(images: np.ndarray, columns: int, *, high: float = 1.0) -> np.ndarray:
    """Images (N, H, W) or (N, H, W, 3) as one, in [0, 1]: `columns` to a row, all with 0 as black and `high` as white.

    Values outside [0, high] are clipped. One pixel of white separates the images.
    """
    images = np.clip(np.asarray(images, dtype=np.float64) / high, 0, 1)
    count, height, width = images.shape[:3]
    rows = -(-count // columns)
    drawn = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, *images.shape[3:]))
    for k, image in enumerate(images):
        top, left = (k // columns) * (height + 1), (k % columns) * (width + 1)
        drawn[top : top + height, left : left + width] = image
    return drawn


def show_images(axis: Any, images: np.ndarray, columns: int, *, high: float = 1.0) -> None:
    """Draw the `sheet` of images (N, H, W) or (N, H, W, 3)."""
    axis.imshow(sheet(images, columns, high=high), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


def show_pictures(axis: Any, arrays: Arrays, images: np.ndarray, columns: int, title: str = "") -> None:
    """`show_images` for (N, H, W, C), with the last of the data set's grey levels, `arrays["levels"]`, as white."""
    images = images[..., 0] if images.shape[-1] == 1 else images
    show_images(axis, images, columns, high=float(arrays["levels"]) - 1)
    axis.set_title(title)


def panels(arrays: Arrays, titles: Mapping[str, str], across: int, columns: int, *, height: float) -> Any:
    """A panel for each of `titles`, `across` to a row, with 24 images of `shown_<name>`, `columns` to a row of it."""
    figure, axes = new(across, len(titles) // across, height=height)
    for axis, (name, title) in zip(np.ravel(axes), titles.items(), strict=True):
        show_pictures(axis, arrays, arrays[f"shown_{name}"][:24], columns, title)
    return figure


def kernel_distances(arrays: Arrays, titles: Mapping[str, str], colours: Mapping[str, str], *, height: float) -> Any:
    """Squared kernel distances to held-out photographs: for each kind in `titles` the rows value, low and high of
    `kernel_<kind>` (sets, 3), each as a dot on a bar; `colours` by the sets' names.

    The axis is linear between -0.1 and 0.1, where a grey line stands, and logarithmic beyond.
    """
    figure, axes = new(len(titles), height=height, sharey=True)
    places = np.arange(len(colours))[::-1]
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for place, (value, low, high), colour in zip(places, arrays[f"kernel_{kind}"], colours.values(), strict=True):
            axis.plot([low, high], [place, place], color=colour, linewidth=1.5)
            axis.plot(value, place, "o", color=colour, markersize=4)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.axvline(0.1, color="0.8", linewidth=0.6, zorder=0)
        axis.set(xlabel="squared kernel distance", title=title)
        low, high = arrays[f"kernel_{kind}"].min(), arrays[f"kernel_{kind}"].max()
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set_xlim(min(1.3 * low, -0.02), 1.5 * high)
        axis.xaxis.set_major_formatter("{x:g}")
    axes[0].set_yticks(places, list(colours))
    return figure


def show_curve(axis: Any, places: Any, estimates: np.ndarray, colour: str, label: str | None = None) -> None:
    """Draw the rows of `estimates` (n, 3), value, low and high, as dots with bars, joined by a line."""
    values, lows, highs = estimates.T
    bars = [values - lows, highs - values]
    axis.errorbar(places, values, bars, fmt="o-", markersize=3, color=colour, linewidth=1, label=label)
