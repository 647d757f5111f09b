"""The figures of notebook 04, drawn from the arrays of a run alone (`measurements` says what they are)."""

from typing import Any

import numpy as np

from paperlib.pixelvae.measurements import LAGS, PROBES, SETS
from paperlib.pixelvae.training import CODED, PRETRAINING, VARIANTS
from paperlib.runs import plotting
from paperlib.runs.plotting import BLUE, GREEN, GREY, ORANGE, RED, Arrays, show_curve, show_pictures


def chain(arrays: Arrays) -> Any:
    """P4: 60 states of one chain in reading order, 4 rows of 15, without the KL and under the ELBO."""
    figure, axes = plotting.new(rows=2, height=4.4)
    titles = {"none": "without the KL", "elbo": "under the ELBO"}
    for axis, (model, title) in zip(axes, titles.items(), strict=True):
        show_pictures(axis, arrays, arrays[f"chain_{model}"][:60], 15, title)
    return figure


STYLES = {PRETRAINING: (GREY, "-"), "none": (BLUE, "-"), "elbo": (RED, "-"), "mmd": (GREEN, "-")}
STYLES |= {"none-scratch": (BLUE, ":"), "elbo-scratch": (RED, ":"), "unconditional": ("black", "--")}
STYLES |= {"label": (ORANGE, "--"), "linear": (plotting.PALETTE[9], "-")}


def training(arrays: Arrays) -> Any:
    """P1, P2: bits per dimension while training, and what the decoder loses when z is that of another image."""
    figure, (left, right) = plotting.new(2, height=3.6, width_ratios=[3, 2])
    _show_histories(left, arrays)
    rows, places = [list(VARIANTS).index(name) for name in CODED], np.arange(len(CODED))
    gap, kl = (arrays[term][rows].mean(1) for term in ("shuffle_gap", "kl"))
    right.bar(places - 0.2, gap, 0.38, color=BLUE, label="shuffle gap")
    right.bar(places + 0.2, kl, 0.38, color=GREY, label="KL(q(z|x) ‖ p(z))")
    right.set_yscale("symlog", linthresh=0.1)
    right.set_xticks(places, CODED, rotation=30, ha="right")
    for limit in (0.1, 0.5, 5):  # of P1 and P2
        right.axhline(limit, color="black", linewidth=0.6, linestyle=":")
    right.axhline(0, color="black", linewidth=0.6)
    right.set(ylabel="nats per image")
    right.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def _show_histories(axis: Any, arrays: Arrays) -> None:
    """Held-out bits per dimension against steps, fine-tuning after pretraining; an inset has its second half."""
    inset = axis.inset_axes([0.5, 0.33, 0.48, 0.35])
    inset.set_title("second half of fine-tuning", fontsize=7)
    pretrained = f"{PRETRAINING}_history"
    offset = arrays[pretrained][-1, 0] if pretrained in arrays else 0
    histories = {name: arrays[f"{name}_history"] for name in STYLES if f"{name}_history" in arrays}
    for name, history in histories.items():
        colour, line = STYLES[name]
        steps, _, held_out = history.T
        fine_tuned = name != PRETRAINING and not VARIANTS[name].scratch
        steps = steps + offset * fine_tuned
        axis.plot(steps, held_out, line, color=colour, label=name, linewidth=1.2)
        if fine_tuned:
            second = len(steps) // 2  # the half in which they have settled
            inset.plot(steps[second:], held_out[second:], line, color=colour, linewidth=1.2)
    final = [history[-1, 2] for history in histories.values()]
    axis.set_ylim(min(final) - 0.05, max(final) + 0.6)
    axis.set(xlabel="steps", ylabel=r"$-E \log p(x|z)$ (bits/dim, held out)")
    axis.legend(ncols=3, fontsize=7, loc="upper right")
    inset.tick_params(labelsize=6)


def ways_to_draw(arrays: Arrays) -> Any:
    """P3: images decoded from codes of several distributions, the same model; photographs beside them."""
    titles = {"held-out photographs": "photographs", "none: q(z)": "z ~ q(z), from photographs"}
    titles |= {"none: prior": "z ~ N(0, I)", "none: Gaussian": "z ~ Gaussian fitted to q(z)"}
    titles |= {"none: mixture": "z ~ mixture fitted to q(z)", "none: chain": "the chain from noise, last states"}
    return plotting.panels(arrays, titles, 3, 8, height=2.3)


def regularised(arrays: Arrays) -> Any:
    """P6: the same with an MMD between q(z) and N(0, I), and under the ELBO."""
    titles = {"mmd: q(z)": "MMD: z ~ q(z)", "mmd: prior": "MMD: z ~ N(0, I)", "elbo: prior": "ELBO: z ~ N(0, I)"}
    return plotting.panels(arrays, titles, 3, 8, height=1.15)


def distances(arrays: Arrays) -> Any:
    """P3, P6: squared kernel distance of each way of drawing to held-out photographs, on two kinds of features."""
    models = {"none": BLUE, "elbo": RED, "mmd": GREEN}
    colours = {name: models.get(name.split(":")[0], "black") for name in SETS}
    titles = {"classifier": "features of a classifier", "random": "features of a random network"}
    return plotting.kernel_distances(arrays, titles, colours, height=4.0)


def memory(arrays: Arrays) -> Any:
    """P4: how long the chain remembers, without the KL and under the ELBO."""
    figure, axes = plotting.new(2, height=3.0, sharey=True)
    views = {"pixels": "pixels", "classifier": "features of a classifier"}
    for axis, (view, words) in zip(axes, views.items(), strict=True):
        for model, colour in (("none", BLUE), ("elbo", RED)):
            show_curve(axis, LAGS, arrays[f"similarity_{model}_{view}"], colour, model)
            value = arrays[f"decodes_{model}_{view}"][0]
            axis.axhline(value, color=colour, linestyle=":", linewidth=1, label=f"{model}: two decodes of one z")
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set(xscale="log", xlabel="lag (steps)", title=f"by {words}")
        axis.set_xticks(LAGS, LAGS)
        axis.minorticks_off()
    axes[0].set_ylabel("autocorrelation")
    figure.legend(*axes[1].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=4)
    return figure


def many(arrays: Arrays) -> Any:
    """36 chains after their last step, and two decodes of one z, without the KL and under the ELBO."""
    figure, axes = plotting.new(2, 2, height=3.1, height_ratios=[2, 1])
    for (top, bottom), model, title in zip(axes.T, ("none", "elbo"), ("without the KL", "ELBO"), strict=True):
        show_pictures(top, arrays, arrays[f"many_{model}"], 9, f"{title}: 36 chains")
        pairs = np.concatenate(arrays[f"shown_decodes_{model}"])
        show_pictures(bottom, arrays, pairs, len(pairs) // 2, "two decodes (rows) of one z (columns)")
    return figure


def probe(arrays: Arrays) -> Any:
    """P5, D1: what a linear classifier makes of the features, in per cent of held-out images."""
    figure, axis = plotting.new(width=5.0, height=2.6)
    right = arrays["probe_right"]
    share, error = 100 * right.mean(1), 196 * right.std(1) / np.sqrt(right.shape[1])
    places = np.arange(len(PROBES))[::-1]
    axis.barh(places, share, xerr=error, color=[GREY] * 3 + [BLUE] * len(CODED), height=0.7, error_kw={"lw": 1})
    axis.set_yticks(places, PROBES)
    axis.set(xlabel="accuracy of a linear probe (%)")
    return figure


def glasses(arrays: Arrays) -> Any:
    """G1: the class as code. What the best factored Gaussian and a PixelCNN++ make of "an image of this class"."""
    figure, axis = plotting.new(height=4.4)
    rows = [arrays[name] for name in ("glasses_photograph", "gaussian_mean", "gaussian_sample")]
    sheet = np.stack([*rows, *arrays["glasses_sample"].swapaxes(0, 1)])
    show_pictures(axis, arrays, np.concatenate(sheet), sheet.shape[1])
    names = ["photograph", "Gaussian, mean", "Gaussian, draw", *["PixelCNN++, draw"] * 4]
    side = sheet.shape[2] + 1
    axis.set_yticks([side * (k + 0.5) for k in range(len(sheet))], names)
    axis.tick_params(length=0)
    return figure


def continued(states: np.ndarray, levels: int) -> Any:
    """States (T, N, S, S, C) of a few chains, one to a row, the photograph first; closed, so that it shows once."""
    from matplotlib import pyplot

    figure, axis = plotting.new(width=3.6, height=3.6)
    by_chain = np.concatenate(states.swapaxes(0, 1))
    show_pictures(axis, {"levels": np.array(levels)}, by_chain, len(states), "from photographs (left), step by step")
    pyplot.close(figure)
    return figure
