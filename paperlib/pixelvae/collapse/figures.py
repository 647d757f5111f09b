"""The figures of notebook 05, drawn from the arrays of a run alone; those of notebook 04 where they fit."""

from typing import Any

import numpy as np

from paperlib.pixelvae import figures as shared
from paperlib.pixelvae.collapse.claims import decoder_names
from paperlib.pixelvae.collapse.measurements import PROBED
from paperlib.pixelvae.collapse.training import ROUTES
from paperlib.pixelvae.measurements import SETS
from paperlib.runs import plotting
from paperlib.runs.estimate import rows
from paperlib.runs.plotting import BLUE, GREEN, GREY, ORANGE, PALETTE, RED, Arrays, show_curve
from paperlib.stats import intervals

chain = shared.chain
SHOWN = (
    "held-out photographs", "none: q(z)", "none: prior", "none: Gaussian", "none: mixture", "none: chain",
    "none: chain from data", "elbo: prior", "elbo: chain",
)  # fmt: skip


def _words(name: str) -> str:
    """The name of a set of images that may be of photographs, of digits."""
    return name.replace("photographs", "digits")


def decodes(arrays: Arrays) -> Any:
    """P2m: held-out digits, and two decodes of one code of each, of both models."""
    return shared.decodes(arrays, "digit")


def distances(arrays: Arrays) -> Any:
    """P3m: squared kernel distance of each way of drawing to held-out digits, on two kinds of features."""
    return shared.distances(arrays, _words)


def ladder(arrays: Arrays) -> Any:
    """P1: KL, code gain and the bound of each decoder and seed, against the decoder's own log-likelihood."""
    figure, axes = plotting.new(3, height=2.9)
    own = arrays["ladder_own"]
    values = arrays["ladder_kl"], arrays["ladder_gain"], arrays["ladder_bound"] - own
    titles = "KL (nats)", "code gain (nats)", "ELBO less own (nats)"
    for axis, by_decoder, title in zip(axes, values, titles, strict=True):
        for k, name in enumerate(decoder_names(arrays)):
            axis.plot(own[k], by_decoder[k], "o", markersize=4, color=PALETTE[k], label=name)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set(xlabel="own log-likelihood (nats)", title=title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def ladder_training(arrays: Arrays) -> Any:
    """P1: the held-out KL of each decoder and seed while training."""
    figure, axis = plotting.new(height=2.8)
    for k, name in enumerate(decoder_names(arrays)):
        for s, history in enumerate(arrays["ladder_history"][k]):
            axis.plot(arrays["ladder_steps"], history, color=PALETTE[k], linewidth=1.2, label=name if s == 0 else None)
    axis.set(xlabel="steps", ylabel="KL (nats, held out)", yscale="log")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def routes(arrays: Arrays) -> Any:
    """P1b: KL and ELBO on four routes, against all steps that the model has had."""
    figure, (left, right) = plotting.new(2, height=2.9)
    for name, colour in zip(ROUTES, (RED, GREY, BLUE, GREEN), strict=True):
        steps, kl, bound = arrays[f"{name}_route"].T
        left.plot(steps, kl, "o-", markersize=2.5, color=colour, linewidth=1.2, label=name)
        right.plot(steps, bound, "o-", markersize=2.5, color=colour, linewidth=1.2)
    left.set(xlabel="steps", ylabel="KL (nats, held out)", yscale="log")
    right.set(xlabel="steps", ylabel="ELBO (nats, held out)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def capacity(arrays: Arrays) -> Any:
    """The sweep of the code alone, as in notebook 04."""
    chosen = arrays["sweep_kinds"] == "code"
    return shared.capacity({**arrays, **{k: v[chosen] for k, v in arrays.items() if k.startswith("sweep_")}})


def ways_to_draw(arrays: Arrays) -> Any:
    """P3m: digits decoded from codes of several distributions, the same model; held-out ones beside them."""
    titles = {"held-out photographs": "held-out digits", "none: q(z)": "z ~ q(z), from held-out digits"}
    titles |= {"none: prior": "z ~ N(0, I)", "none: Gaussian": "z ~ Gaussian fitted to q(z)"}
    titles |= {"none: mixture": "z ~ mixture fitted to q(z)", "none: chain": "the chain from noise, last states"}
    return plotting.panels(arrays, titles, 3, 8, height=2.3)


def classes(arrays: Arrays) -> Any:
    """P4m: the class of every state of 20 chains from noise, a row each, without the KL and under the ELBO."""
    from matplotlib.colors import ListedColormap

    figure, axes = plotting.new(2, height=2.6)
    for axis, (model, title) in zip(axes, shared.TITLES.items(), strict=True):
        rows = arrays[f"classes_{model}"][:, :20].T
        colours = ListedColormap(PALETTE)
        picture = axis.imshow(rows, cmap=colours, vmin=-0.5, vmax=9.5, aspect="auto", interpolation="nearest")
        axis.set(xlabel="step", title=title, yticks=[])
    axes[0].set_ylabel("chains")
    figure.colorbar(picture, ax=axes, ticks=range(10), label="class")
    return figure


def coverage(arrays: Arrays) -> Any:
    """The share of each class in the sets that are SHOWN."""
    figure, axis = plotting.new(height=2.6)
    shares = 100 * arrays["class_shares"][[SETS.index(name) for name in SHOWN]]
    picture = axis.imshow(shares, cmap="Blues", vmin=0, vmax=30, aspect="auto")
    for k, c in np.ndindex(shares.shape):
        dark = "white" if shares[k, c] > 18 else "black"
        axis.text(c, k, f"{shares[k, c]:.0f}", ha="center", va="center", fontsize=6, color=dark)
    axis.set(xticks=range(shares.shape[1]), xlabel="class, by the classifier")
    axis.set_yticks(range(len(SHOWN)), map(_words, SHOWN))
    figure.colorbar(picture, label="share (%)")
    return figure


def probes(arrays: Arrays) -> Any:
    """P5: accuracy of linear probes, with all labels and with few."""
    figure, axis = plotting.new(height=2.2)
    places = np.arange(len(PROBED))
    for k, (label, colour) in enumerate({"all labels": BLUE, "few labels": ORANGE}.items()):
        accuracy = rows(intervals.mean_interval(100 * right) for right in arrays["probe_right"][:, k])
        bars = {"xerr": accuracy[:, 2] - accuracy[:, 0], "error_kw": {"linewidth": 1}}
        axis.barh(places - 0.2 + 0.4 * k, accuracy[:, 0], 0.36, color=colour, label=label, **bars)
    axis.set_yticks(places, PROBED)
    axis.set(xlabel="accuracy of a linear probe on held-out images (%)", xlim=(0, 100))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axis.invert_yaxis()
    return figure


def own(arrays: Arrays) -> Any:
    """P6 and D1: code gain and draws by the weight of the MMD; code gain by dimensions, of both encoders."""
    figure, axes = plotting.new(3, height=2.7)
    mmd = arrays["sweep_kinds"] == "mmd"
    weights = arrays["sweep_weights"][mmd]
    show_curve(axes[0], weights, arrays["sweep_gain"][mmd], BLUE)
    show_curve(axes[1], weights, arrays["sweep_prior"][mmd, 1], RED, "z ~ N(0, I)")
    show_curve(axes[1], weights, arrays["sweep_q_z"][mmd, 1], BLUE, "z ~ q(z)")
    for axis, label in zip(axes, ("code gain (nats)", "squared kernel distance"), strict=False):
        axis.set(xscale="log", xlabel="weight of the MMD", ylabel=label)
    of_none = arrays["sweep_stds"] == arrays["sweep_stds"][0]
    for kind, colour, label in (("code", BLUE, "convolutional"), ("linear", ORANGE, "linear")):
        chosen = np.flatnonzero((arrays["sweep_kinds"] == kind) & of_none)
        chosen = chosen[np.argsort(arrays["sweep_dims"][chosen])]
        show_curve(axes[2], arrays["sweep_dims"][chosen], arrays["sweep_gain"][chosen], colour, label)
    axes[2].set(xlabel="dimensions of the code", ylabel="code gain (nats)")
    axes[1].legend()
    axes[2].legend()
    return figure
