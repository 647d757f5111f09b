"""The figures of notebook 02, drawn from the arrays of a run alone (`fuzziness.measure` says what they are)."""

from typing import Any

import numpy as np

from paperlib.fuzziness.claims import Arrays, label_entropy, ranked
from paperlib.fuzziness.measurements import COLUMNS, HEAVIEST, MADE_OF, MOSAIC, ROWS
from paperlib.runs import plotting
from paperlib.runs.plotting import BLUE, GREEN, ORANGE, RED
from paperlib.stats.rank_correlation import rank_residuals

PITCH = 2.4  # from one labelled digit to the next, in widths of a digit
QUOTED = 0.25  # share of codes from which the mean variance over those where it may be quoted is drawn


def error_split(arrays: Arrays) -> Any:
    """Equation (3) at codes z ~ q(z): the decoder's error against Var q(x|z); the height above the line is its gap."""
    figure, axis = plotting.new(width=4.2, height=3.4)
    limit = 1.05 * arrays["error"][0].max()
    axis.plot([0, limit], [0, limit], color="black", linewidth=0.8, label=r"$\mu(z) = E_q[x|z]$: the least possible")
    axis.scatter(arrays["spread"][0], arrays["error"][0], s=4, alpha=0.4, color=BLUE, label="codes z ~ q(z)")
    axis.set(xlim=(0, limit), ylim=(0, limit), xlabel=r"tr Var$_q[x|z]$ (pixels in [0, 1])")
    axis.set_ylabel(r"$E_{q(x|z)}\,|x - \mu(z)|^2$ (pixels in [0, 1])")
    axis.legend(loc="lower right")
    return figure


def fuzziness(arrays: Arrays) -> Any:
    """The post's picture: sharp digits on the left, averages of 4, 9 and 5 on the right, each with its label mixture;
    below, variance per ink and label entropy over all ranks, the tenths from which they are taken shaded."""
    order, entropy = ranked(arrays, 0), label_entropy(arrays["labels"][0])
    figure, (tops, below) = plotting.new(2, 2, height=5.4, height_ratios=[3.0, 2.2])
    for axis in below:
        axis.remove()
    titles = {"sharp": "least Var q(x|z) per ink", "mixed": "most Var q(x|z) per ink: 4, 9 and 5"}
    for axis, (name, title) in zip(tops, titles.items(), strict=True):
        _labelled_digits(axis, arrays[f"{name}_decoded"], arrays["labels"][0][arrays[name]])
        axis.set_title(title)

    bottom = figure.add_subplot(below[0].get_gridspec()[1, :])
    rank = np.linspace(0, 100, len(order))
    bottom.plot(rank, (arrays["variance"][0] / arrays["ink"][0])[order], color=BLUE)
    bottom.set(xlabel="rank among the codes where Var q(x|z) can be trusted (%)", xlim=(0, 100))
    bottom.set_ylabel("tr Var q(x|z)\nper ink", color=BLUE)
    for start in (0, 90):
        bottom.axvspan(start, start + 10, color="0.9", linewidth=0)
    other = bottom.twinx()
    other.plot(rank, entropy[order], ".", markersize=2, color=RED, alpha=0.3)
    other.plot(rank, _running_mean(entropy[order]), color=RED)
    other.set_ylabel("label entropy under\nq(x|z) (nats)", color=RED)
    return figure


def _labelled_digits(axis: Any, images: np.ndarray, labels: np.ndarray) -> None:
    """Images (ROWS x COLUMNS, H, W) in columns, each with the labels of most weight beside it."""
    plotting.show_images(axis, np.ones((1, ROWS, round(PITCH * COLUMNS))), 1)
    for k, (image, mixture) in enumerate(zip(images, labels, strict=True)):
        row, column = k % ROWS, PITCH * (k // ROWS)
        extent = (column - 0.48, column + 0.48, row + 0.48, row - 0.48)
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=extent)
        axis.text(column + 0.54, row, "\n".join(_parts(mixture)[:3]), va="center", fontsize=8)
    axis.set(xlim=(-0.5, PITCH * COLUMNS - 0.5), ylim=(ROWS - 0.5, -0.5))


def _running_mean(values: np.ndarray) -> np.ndarray:
    window = np.ones(max(1, len(values) // 20))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def made_of(arrays: Arrays) -> Any:
    """For codes from low to high variance per ink: decoder mean, mean and std of q(x|z), its heaviest digits."""
    figure, axes = plotting.new(MADE_OF, 3 + HEAVIEST, height=8.8)
    above = [arrays[f"made_of_{name}"] for name in ("decoded", "average", "std")]
    for k, column in enumerate(axes.T):
        for axis, images, high in zip(column, above, (1.0, 1.0, 0.5), strict=False):
            plotting.show_images(axis, images[k : k + 1], 1, high=high)
        code = arrays["made_of"][k]
        per_ink = arrays["variance"][0][code] / arrays["ink"][0][code]
        column[0].set_title(f"{per_ink:.2f} per ink\n{arrays['samples'][0][code]:.0f} samples")
        column[1].set_title("\n".join(_parts(arrays["labels"][0][code])[:3]), fontsize=8)
        heaviest = (arrays[name][k] for name in ("heaviest", "heaviest_labels", "weights"))
        for axis, digit, label, weight in zip(column[3:], *heaviest, strict=True):
            plotting.show_images(axis, digit[None], 1)
            axis.set_title(f"{label}:  {100 * weight:.1f} %")
    names = (r"decoder $\mu(z)$", r"$E_q[x|z]$", "std\n(white: 0.5)", "heaviest\ntraining\ndigits")
    for axis, name in zip(axes[:, 0], names, strict=False):
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def _parts(labels: np.ndarray) -> list[str]:
    """The four labels of most weight, as far as they have 1 % or more: "5: 37 %"."""
    best = [label for label in np.argsort(-labels)[:4] if labels[label] >= 0.01]
    return [f"{label}: {100 * labels[label]:.0f} %" for label in best]


def plane(arrays: Arrays) -> Any:
    """The plane of codes: decoded digits, variance of q(x|z) per ink, the label that weighs most, effective samples."""
    figure, ((decoded, variance), (labels, samples)) = plotting.new(2, 2, height=6.6)
    plotting.show_images(decoded, arrays["plane_decoded"], MOSAIC, high=255)
    decoded.set_title("decoder mean, z from -3 to 3 in both dimensions")

    span = {"extent": (-3, 3, -3, 3), "interpolation": "nearest"}
    trusted = np.where(arrays["plane_trusted"], arrays["plane_variance"], np.nan)
    maps = (variance, trusted, "viridis"), (samples, np.log10(arrays["plane_samples"]), "cividis")
    for axis, values, colours in maps:
        figure.colorbar(axis.imshow(values, cmap=colours, **span), ax=axis, shrink=0.85)
    variance.set_title("tr Var q(x|z) per ink (white: too few samples)")
    samples.set_title(r"$\log_{10}$ effective sample size")
    _draw_borders(variance, arrays["plane_labels"])

    _show_classes(labels, arrays["plane_labels"])
    labels.set_title("label that weighs most (paler: less pure)")
    for axis in (variance, samples):
        axis.set(xlabel="$z_1$", ylabel="$z_2$")
    return figure


def walk(arrays: Arrays) -> list[Any]:
    """The frames of an animation, Pillow images: a code on its way through the plane, and what it stands for."""
    from matplotlib import pyplot
    from PIL import Image

    figure, axes = plotting.new(4, 2, height=3.3, width_ratios=[2.2, 1, 1, 1])
    for axis in axes[:, 0]:
        axis.remove()
    plane = figure.add_subplot(axes[0, 0].get_gridspec()[:, 0])
    _show_classes(plane, arrays["plane_labels"])
    path = np.concatenate([arrays["walk_z"], arrays["walk_z"][:1]])
    plane.plot(*path.T, color="black", linewidth=0.6)
    (place,) = plane.plot([0], [0], "o", color="black", markersize=7, markeredgecolor="white")
    names = {"decoded": r"decoder $\mu(z)$", "average": r"$E_q[x|z]$", "std": "std under q(x|z)"}
    pictures = np.concatenate(
        [np.stack([arrays[f"walk_{name}"] for name in names], 1), arrays["walk_heaviest"][:, :3]], axis=1
    )
    frames = []
    for k, row in enumerate(pictures):
        titles = [*names.values(), *(f"weighs {100 * weight:.1f} %" for weight in arrays["walk_weights"][k, :3])]
        for axis, image, title in zip(axes[:, 1:].flat, row, titles, strict=True):
            axis.clear()
            plotting.show_images(axis, image[None], 1, high=255)
            axis.set_title(title, fontsize=8)
        place.set_data(*arrays["walk_z"][k : k + 1].T)
        parts = ", ".join(_parts(arrays["walk_labels"][k])[:3])
        plane.set_title(f"{parts}\nVar q(x|z) per ink {arrays['walk_variance'][k]:.2f}", fontsize=8)
        figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB"))
    pyplot.close(figure)
    return frames


def _show_classes(axis: Any, mixtures: np.ndarray) -> None:
    """The plane in the colours of the labels that weigh most (S, S, K), paler where less pure, with their names."""
    from matplotlib.colors import to_rgba_array

    best, purity = mixtures.argmax(-1), mixtures.max(-1)
    colours = to_rgba_array(plotting.PALETTE)[best, :3]
    axis.imshow(1 - purity[..., None] * (1 - colours), extent=(-3, 3, -3, 3), interpolation="nearest")
    for label in np.unique(best):
        row, column = np.median(np.nonzero((best == label) & (purity >= np.median(purity[best == label]))), axis=1)
        x, y = (column + 0.5) * 6 / len(best) - 3, 3 - (row + 0.5) * 6 / len(best)
        axis.text(x, y, label, ha="center", va="center", fontweight="bold")
    axis.set(xlabel="$z_1$", ylabel="$z_2$")


def _draw_borders(axis: Any, mixtures: np.ndarray) -> None:
    """Lines between the regions of classes: where, smoothed over a cell or two, another label (S, S, K) weighs most."""
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(mixtures, sigma=(1.5, 1.5, 0), mode="nearest")
    places = (np.arange(len(smooth)) + 0.5) * 6 / len(smooth) - 3
    for label in np.unique(smooth.argmax(-1)):
        lead = smooth[..., label] - np.delete(smooth, label, axis=-1).max(-1)
        axis.contour(places, -places, lead, levels=[0.0], colors="black", linewidths=0.6)


def sharpness(arrays: Arrays) -> Any:
    """F2: ranks of the decoded image's edge width and spectral slope against ranks of tr Var_q, controls taken out."""
    import seaborn

    figure, axes = plotting.new(3, height=2.9, sharex=True, sharey=True)
    panels = {"edge width": ("", "edge_width", 1), "spectral slope (steeper upward)": ("", "slope", -1)}
    panels["edge width, Bernoulli decoder"] = ("bernoulli_", "edge_width", 1)
    for axis, (title, (prefix, name, sign)) in zip(axes, panels.items(), strict=True):
        chosen = arrays[f"{prefix}reliable"][0] & np.isfinite(arrays[prefix + name][0])
        variance, value, ink, log_q = (arrays[prefix + n][0][chosen] for n in ("variance", name, "ink", "log_q"))
        x, y = rank_residuals((variance, sign * value), (ink, log_q)) / len(ink)
        dots, line = {"s": 3, "alpha": 0.25}, {"color": RED, "linewidth": 1.2}
        seaborn.regplot(x=x, y=y, ax=axis, scatter_kws=dots, line_kws=line, n_boot=200, seed=0)
        axis.set(title=title, xlabel="")
    axes[1].set_xlabel("rank of tr Var q(x|z), ink and log q(z) regressed out, over number of codes")
    axes[0].set_ylabel("rank of fuzziness,\nthe same regressed out")
    return figure


def better_q(arrays: Arrays) -> Any:
    """F4: the error of ever larger decoders for one frozen q, and what more dimensions of the code do to samples."""
    figure, (frozen, error, width) = plotting.new(3, height=2.8)
    for row, floor in zip(arrays["frozen_error"], arrays["floor"], strict=True):
        frozen.plot(arrays["frozen_units"], row, "o-", markersize=3, color=BLUE)
        frozen.axhline(floor, color="black", linewidth=0.8)
    frozen.set(xlabel="units per layer of the decoder", title="q frozen: E tr Var$_q$ (black)")
    frozen.set_ylabel("squared error per image\n(pixels in [0, 1])")
    dims = arrays["code_dims"]
    for k, (row, variance, edges) in enumerate(
        zip(arrays["swept_error"], arrays["swept_variance"], arrays["swept_width"], strict=True)
    ):
        quoted = np.where(arrays["swept_reliable"][k] >= QUOTED, variance, np.nan)
        names = ("held-out error", "E tr Var$_q$, where quoted") if k == 0 else (None, None)
        error.plot(dims, row, "o-", markersize=3, color=ORANGE, label=names[0])
        error.plot(dims, quoted, "s--", markersize=3, color=BLUE, label=names[1])
        width.plot(dims, edges, "o-", markersize=3, color=GREEN)
    error.set(ylabel="squared error per image", title="held-out error, variance")
    width.set(ylabel="edge width (pixels)", title="sharpness")
    for axis, ticks in ((frozen, arrays["frozen_units"]), (error, dims), (width, dims)):
        axis.set_xscale("log")
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
    for axis in (error, width):
        axis.set_xlabel("dimensions of the code")
    error.set_ylim(0, None)
    error.legend(loc="lower left", fontsize=7)
    return figure
