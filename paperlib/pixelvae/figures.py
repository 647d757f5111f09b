"""The figures of notebook 04, drawn from the arrays of a run alone (`measurements` and `glasses` say what they are)."""

from collections.abc import Callable
from typing import Any

import numpy as np

from paperlib.pixelvae.measurements import LAGS, SETS
from paperlib.runs import plotting
from paperlib.runs.plotting import BLUE, GREEN, GREY, ORANGE, RED, Arrays, show_curve, show_pictures

TITLES = {"none": "without the KL", "elbo": "under the ELBO"}
COLOURS = {"none": BLUE, "elbo": RED, "unconditional": GREY}


def chain(arrays: Arrays) -> Any:
    """P4: 60 states of one chain in reading order, 4 rows of 15, without the KL and under the ELBO."""
    figure, axes = plotting.new(rows=2, height=4.4)
    for axis, (model, title) in zip(axes, TITLES.items(), strict=True):
        show_pictures(axis, arrays, arrays[f"chain_{model}"][:60], 15, title)
    return figure


def chains_from_data(arrays: Arrays) -> Any:
    """P4: the first 15 steps of eight chains from photographs, a chain to a row, of both models."""
    figure, axes = plotting.new(rows=2, height=7.9)
    for axis, (model, title) in zip(axes, TITLES.items(), strict=True):
        states = arrays[f"from_data_{model}"].swapaxes(0, 1)
        show_pictures(axis, arrays, np.concatenate(states), states.shape[1], f"{title}, from photographs (left)")
    return figure


def decodes(arrays: Arrays, picture: str = "photograph") -> Any:
    """P2: photographs, or another kind of `picture`, and two decodes of one code of each, of both models."""
    figure, axes = plotting.new(rows=2, height=3.8)
    for axis, (model, title) in zip(axes, TITLES.items(), strict=True):
        pictures = arrays[f"shown_decodes_{model}"]
        show_pictures(axis, arrays, np.concatenate(pictures), pictures.shape[1], title)
        _name_rows(axis, [picture, "decode", "another"], pictures.shape[2])
    return figure


def training(arrays: Arrays) -> Any:
    """P2: held-out bits per dimension while training, and the correlation of two decodes of one code."""
    figure, (left, right) = plotting.new(2, height=3.0)
    histories = {name: arrays[f"{name}_history"] for name in COLOURS}
    for name, history in histories.items():
        steps, _, held_out, two = history.T
        left.plot(steps, held_out, color=COLOURS[name], label=name, linewidth=1.2)
        if np.isfinite(two).any():
            right.plot(steps, two, color=COLOURS[name], label=name, linewidth=1.2)
    lowest = min(history[:, 2].min() for history in histories.values())
    left.set(ylim=(lowest - 0.05, lowest + 1.2), xlabel="steps", ylabel=r"$-E \log p(x|z)$ (bits/dim, held out)")
    left.legend()
    right.set(xlabel="steps", ylabel="correlation of two decodes of one z", ylim=(0, 1))
    return figure


def ways_to_draw(arrays: Arrays) -> Any:
    """P3: images decoded from codes of several distributions, the same model; photographs beside them."""
    titles = {"held-out photographs": "photographs", "none: q(z)": "z ~ q(z), from photographs"}
    titles |= {"none: prior": "z ~ N(0, I)", "none: Gaussian": "z ~ Gaussian fitted to q(z)"}
    titles |= {"none: mixture": "z ~ mixture fitted to q(z)", "none: chain": "the chain from noise, last states"}
    return plotting.panels(arrays, titles, 3, 8, height=2.3)


def distances(arrays: Arrays, words: Callable[[str], str] = str) -> Any:
    """P3: squared kernel distance of each of SETS, in these `words`, to held-out images, on two kinds of features."""
    colours = {words(name): {"none": BLUE, "elbo": RED}.get(name.split(":")[0], "black") for name in SETS}
    titles = {"classifier": "features of a classifier", "random": "features of a random network"}
    return plotting.kernel_distances(arrays, titles, colours, height=3.8)


def memory(arrays: Arrays) -> Any:
    """P4: how long the chain remembers, without the KL and under the ELBO."""
    figure, axes = plotting.new(2, height=3.0, sharey=True)
    views = {"": "pixels", "_classifier": "features of a classifier"}
    for axis, (view, words) in zip(axes, views.items(), strict=True):
        for model, title in TITLES.items():
            show_curve(axis, LAGS, arrays[f"correlation_{model}{view}"], COLOURS[model], title)
            value = arrays[f"decodes_{model}{view}"][0]
            axis.axhline(value, color=COLOURS[model], linestyle=":", linewidth=1, label="two decodes of one z")
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set(xscale="log", xlabel="lag (steps)", title=f"by {words}")
        axis.set_xticks(LAGS, LAGS)
        axis.minorticks_off()
    axes[0].set_ylabel("correlation of states")
    figure.legend(*axes[1].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=4)
    return figure


def capacity(arrays: Arrays) -> Any:
    """The sweep: what a code tells against how its chain moves and where it drifts, and one chain of each code."""
    figure, axes = plotting.new(3, 2, height=5.2, height_ratios=[2, 3])
    order = np.argsort(arrays["sweep_rate"])
    rate = arrays["sweep_rate"][order]
    for k, lag in enumerate(LAGS):
        if lag in (1, 20):
            colour = BLUE if lag == 1 else GREEN
            show_curve(axes[0, 0], rate, arrays["sweep_correlation"][order, k], colour, f"states {lag} apart")
    show_curve(axes[0, 0], rate, arrays["sweep_decodes"][order], GREY, "two decodes of one z")
    axes[0, 0].legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes[0, 0].set(ylabel="correlation of pixels")
    axes[0, 1].plot(rate, arrays["sweep_time"][order], "o-", color=ORANGE, markersize=3, linewidth=1)
    axes[0, 1].set(ylabel="autocorrelation time (steps)")
    show_curve(axes[0, 2], rate, arrays["sweep_drift"][order], RED)
    axes[0, 2].set(ylabel="kernel distance, steps 40 to 60")
    for axis in axes[0]:
        axis.set(xlabel="rate of the code (nats)", ylim=(0, None))
    for axis in axes[1]:
        axis.remove()
    axis, states = figure.add_subplot(axes[0, 0].get_gridspec()[1, :]), arrays["sweep_states"][order]
    show_pictures(axis, arrays, np.concatenate(states), states.shape[1])
    dims, stds = arrays["sweep_dims"][order], arrays["sweep_stds"][order]
    names = [f"{d} dimensions, {std:g}: {r:.0f} nats" for d, std, r in zip(dims, stds, rate, strict=True)]
    _name_rows(axis, names, states.shape[2])
    return figure


def glasses(arrays: Arrays) -> Any:
    """G1: what the best Gaussian makes of "an image of this class", and of other features, beside the photograph."""
    rows = {
        "photograph": "glasses_photograph",
        "class: mean": "glasses_class_mean",
        "class: draw": "glasses_class_draw",
        "brightness: mean": "glasses_brightness_mean",
        "brightness: draw": "glasses_brightness_draw",
        "upper half: mean": "glasses_half_mean",
        "upper half: draw": "glasses_half_draw",
    }
    sheet = np.stack([*(arrays[name] for name in rows.values()), *arrays["glasses_half_pixelcnn"]])
    figure, axis = plotting.new(height=5.2)
    show_pictures(axis, arrays, np.concatenate(sheet), sheet.shape[1])
    _name_rows(axis, [*rows, *["upper half: PixelCNN++"] * 2], sheet.shape[2])
    return figure


def _name_rows(axis: Any, names: list[str], side: int) -> None:
    """Words to the left of the rows of pictures `side` pixels high."""
    axis.set_yticks([(side + 1) * (k + 0.5) for k in range(len(names))], names)
    axis.tick_params(length=0)


def continued(states: np.ndarray, levels: int) -> Any:
    """States (T, N, S, S, C) of a few chains, one to a row, the photograph first; closed, so that it shows once."""
    from matplotlib import pyplot

    figure, axis = plotting.new(width=3.6, height=3.6)
    by_chain = np.concatenate(states.swapaxes(0, 1))
    show_pictures(axis, {"levels": np.array(levels)}, by_chain, len(states), "from photographs (left), step by step")
    pyplot.close(figure)
    return figure
