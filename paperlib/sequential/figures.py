"""The figures of notebook 03, drawn from the arrays of a run alone (`measurements` says what they are)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from paperlib.runs import plotting
from paperlib.runs.estimate import rows
from paperlib.runs.plotting import BLUE, GREEN, GREY, ORANGE, RED, show_pictures
from paperlib.sequential.claims import per_step
from paperlib.sequential.measurements import KINDS, SETS

Arrays = Mapping[str, np.ndarray]

CELL = 0.78  # inches that an image of a chain takes
ONE_TWO_FIVE = [float(f"{digit}e{power}") for power in range(-4, 4) for digit in (1, 2, 5)]


def _rows(states: np.ndarray) -> np.ndarray:
    """(T, N, S, S, C) so that a grid of T columns shows one of N to a row."""
    return states.swapaxes(0, 1).reshape(-1, *states.shape[2:])


def _plain_ticks(axis: Any, which: str, places: list[float]) -> None:
    """Ticks of a logarithmic axis at round numbers, as such: those of `places` that are within its limits."""
    from matplotlib.ticker import NullLocator

    ticks = getattr(axis, f"{which}axis")
    low, high = ticks.get_view_interval()
    ticks.set_ticks(inside := [place for place in places if low <= place <= high], [f"{place:g}" for place in inside])
    ticks.set_minor_locator(NullLocator())


def _label_columns(axis: Any, names: list[str], side: int) -> None:
    axis.set_xticks([(side + 1) * (k + 0.5) for k in range(len(names))], names)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)


def samples(arrays: Arrays) -> Any:
    """S4: ten samples of the chain, one to a row: noise, then x(1) .. x(T)."""
    return _chains(arrays, arrays["chain"])


def samples_from_standard(arrays: Arrays) -> Any:
    """S4: the same noise as codes from N(0, I), not from the priors that fit."""
    return _chains(arrays, arrays["chain_standard"])


def _chains(arrays: Arrays, states: np.ndarray) -> Any:
    count, rows, side = states.shape[:3]
    figure, axis = plotting.new(width=CELL * count, height=CELL * rows)
    show_pictures(axis, arrays, _rows(states), count)
    _label_columns(axis, ["noise", *(f"x({t})" for t in range(1, count))], side)
    return figure


def reconstructions(arrays: Arrays) -> Any:
    """S1: held-out photographs rebuilt step by step; below, the error, what is lost without a code, and its KL."""
    rebuilt = arrays["rebuilt"]
    count, _, side = rebuilt.shape[:3]
    figure, axes = plotting.new(3, 2, height=9.2, height_ratios=[4, 1])
    grid = axes[0, 0].get_gridspec()
    for axis in axes[0]:
        axis.remove()
    top, (error, lost, rate) = figure.add_subplot(grid[0, :]), axes[1]
    sheet = np.concatenate([arrays["targets"][None], rebuilt])
    show_pictures(top, arrays, _rows(sheet), count + 1)
    _label_columns(top, ["photograph", *(f"x({t})" for t in range(1, count + 1))], side)
    steps, numbers = np.arange(1, count + 1), per_step(arrays)
    error.plot(steps, arrays["sequential_error"].mean(0), "o-", color=BLUE, markersize=3, label="sequential")
    error.axhline(
        arrays["one_step_error"].mean(), color=ORANGE, linestyle="--", linewidth=1.2, label="one-step baseline"
    )
    error.set_ylabel("held-out squared error\nper dimension")
    for name, colour, label in (("lost", RED, "another image's code"), ("lost_without", GREY, "trained without")):
        values = rows(numbers[name])
        plotting.show_curve(lost, steps[-len(values) :], values, colour, label)
    lost.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    lost.set_ylabel("share of the step's gain\nthat is lost")
    lost.set_ylim(0, None)
    rate.bar(steps, [one.value for one in numbers["kl"]], 0.6, color=GREEN)
    rate.set_ylabel("KL of the step (nats)")
    for axis in axes[1]:
        axis.set_xlabel("step t")
        axis.set_xticks(steps)
    for axis in (error, lost):
        axis.legend(fontsize=7)
    return figure


def swapped(arrays: Arrays) -> Any:
    """S1: x(t) where the code of step t alone is that of the photograph in the next row; its own codes before."""
    images = arrays["swapped"]
    count, _, side = images.shape[:3]
    figure, (left, right) = plotting.new(2, height=4.2)
    names = [f"x({t})" for t in range(1, count + 1)]
    for axis, states, title in ((left, arrays["rebuilt"], "own codes"), (right, images, "code t from the row below")):
        show_pictures(axis, arrays, _rows(np.concatenate([arrays["targets"][None], states])), count + 1)
        _label_columns(axis, ["", *names], side)
        axis.tick_params(axis="x", labelsize=6)
        axis.set_xlabel(title)
    return figure


def models(arrays: Arrays) -> Any:
    """S2 to S4: samples of the three models, means of the last step, beside photographs."""
    titles = {"training photographs": "photographs", "sequential": "sequential"}
    titles |= {"one_step": "one-step baseline", "infusion": "infusion (last mean)"}
    return plotting.panels(arrays, titles, 2, 6, height=5.6)


def infusion(arrays: Arrays) -> Any:
    """S3: the chain of infusion training, its transitions drawn, one to a row; last, the mean of the last step."""
    states = np.concatenate([arrays["chain_infusion"], arrays["chain_infusion_means"][None]])
    count, rows, side = states.shape[:3]
    figure, axis = plotting.new(width=CELL * count, height=CELL * rows)
    show_pictures(axis, arrays, _rows(states), count)
    _label_columns(axis, ["noise", *(f"x({t})" for t in range(1, count - 1)), "mean"], side)
    return figure


def sharpness(arrays: Arrays) -> Any:
    """S2: edge width of samples along the chain, distance of their power spectra to photographs', and the spectra."""
    figure, (edges, distance, spectra) = plotting.new(3, height=3.2, width_ratios=[3, 3, 4])
    count = len(arrays["edge_sequential"])
    steps = np.arange(1, count + 1)
    lines = {"one_step": (ORANGE, "one-step"), "infusion": (GREEN, "infusion"), "training": ("black", "training")}
    for axis, name, label in (
        (edges, "edge", "edge width of samples (pixels)"),
        (distance, "spectral", "distance of log spectra (nats)"),
    ):
        plotting.show_curve(axis, steps, arrays[f"{name}_sequential"], BLUE)
        for model, (colour, title) in lines.items():
            value, low, high = arrays[f"{name}_{model}"]
            axis.axhline(value, color=colour, linestyle="--", linewidth=1)
            axis.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)
            x, ha, va = (0.02, "left", "top") if model == "one_step" else (0.98, "right", "bottom")
            axis.annotate(title, (x, value), xycoords=("axes fraction", "data"), ha=ha, va=va, fontsize=7)
        axis.set(xlabel="step t", ylabel=label)
        axis.set_xticks(steps)
    frequencies, photographs = arrays["frequencies"], arrays["power_photographs"] + 1 / 12
    for t, power in enumerate(arrays["power_sequential"]):
        label = f"x({t + 1})" if t in (0, count - 1) else None
        spectra.plot(
            frequencies, (power + 1 / 12) / photographs, color=BLUE, alpha=0.25 + 0.75 * t / count, label=label
        )
    for model, (colour, title) in lines.items():
        spectra.plot(frequencies, (arrays[f"power_{model}"] + 1 / 12) / photographs, "--", color=colour, label=title)
    spectra.set(xscale="log", yscale="log", xlabel="cycles per pixel", ylabel="power over held-out photographs'")
    _plain_ticks(spectra, "x", ONE_TWO_FIVE)
    _plain_ticks(spectra, "y", ONE_TWO_FIVE)
    spectra.legend(fontsize=7)
    return figure


def nearest(arrays: Arrays) -> Any:
    """S4: samples with the nearest training photographs, and how near samples and held-out photographs come."""
    figure, axes = plotting.new(2, 2, height=4.6, height_ratios=[1, 1])
    side, grid = arrays["near"].shape[1], axes[0, 0].get_gridspec()
    for axis in axes[0]:
        axis.remove()
    top = figure.add_subplot(grid[0, :])
    sheet = np.stack([arrays["near"], arrays["neighbours_pixels"], arrays["neighbours_thumbnails"]])
    show_pictures(top, arrays, sheet.reshape(-1, *sheet.shape[2:]), sheet.shape[1])
    top.set_yticks([(side + 1) * (k + 0.5) for k in range(3)], ["sample", "nearest by pixels", "by 8 x 8 means"])
    top.tick_params(length=0)
    for axis, view in zip(axes[1], ("pixels", "thumbnails"), strict=True):
        for name, colour in (("sequential", BLUE), ("one_step", ORANGE), ("infusion", GREEN), ("held_out", "black")):
            values = np.sort(arrays[f"nearest_{view}_{name}"])
            shares = np.linspace(0, 1, len(values))
            axis.plot(
                values,
                shares,
                color=colour,
                linewidth=1.2,
                label=name.replace("one_step", "one-step").replace("_", " "),
            )
        axis.set(xlabel=f"RMS difference to the nearest, {view}", ylabel="share of images")
    axes[1, 0].legend(fontsize=7, handlelength=1, loc="upper left", borderpad=0)
    return figure


def distances(arrays: Arrays) -> Any:
    """S4: squared kernel distance of each set to held-out photographs, on two kinds of features."""
    titles = {kind: f"features: {kind}{' network' * (kind == 'random')}" for kind in KINDS}
    colours = {name.replace("one_step", "one-step"): BLUE for name in SETS}
    return plotting.kernel_distances(arrays, titles, colours, height=3.2)


def training(arrays: Arrays) -> Any:
    """What each training watched on held-out images, and the rate of the one-step baseline beside that of the chain."""
    colours = {"sequential": BLUE, "one_step": ORANGE, "infusion": GREEN, "no_latent": GREY}
    histories = {name: arrays[f"{name}_history"].T for name in colours}
    figure, ((*above, rate), (*below, none)) = plotting.new(3, 2, height=4.0)
    none.remove()
    for axis, (name, (steps, _, watched, kl)) in zip([*above, *below], histories.items(), strict=True):
        axis.plot(steps, watched, color=colours[name], linewidth=1.2)
        axis.set(title=name.replace("_", "-"), xlabel="training steps")
        if name in ("sequential", "one_step"):
            rate.plot(steps, kl, color=colours[name], label=name.replace("_", "-"), linewidth=1.2)
    figure.supylabel("watched, held out (nats per dimension)", fontsize=9)
    rate.set(xlabel="training steps", ylabel="KL (nats per image)", title="rate, held out")
    rate.legend(fontsize=7)
    return figure


def drawn(states: np.ndarray, levels: int) -> Any:
    """States (T + 1, N, S, S, C) of a few samples, one to a row, noise first; closed, so that it shows once."""
    from matplotlib import pyplot

    figure = _chains({"levels": np.array(levels)}, states)
    pyplot.close(figure)
    return figure
