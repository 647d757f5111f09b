"""The figures of notebook 01, each drawn from a run's arrays alone."""

from typing import Any

import numpy as np

from paperlib.runs.plotting import PALETTE, Arrays, new

FLOWS = 24  # drawn as lines; more hide one another


def flows(arrays: Arrays) -> Any:
    """Rate against distortion of the flows under the ELBO and without its KL: `FLOWS` of them, evenly spread over the
    order of their ends, and the ends of all as small dots. Arrays `flow_*`, see `measurements`."""
    figure, axes = new(2, height=3.3, sharex=True, sharey=True)
    entropy, most = float(arrays["flow_entropy"]), float(arrays["flow_most"])
    reach = 1.05 * max(arrays[f"flow_{name}_rate"].max() for name in ("elbo", "none"))
    top = max(3.0, 1.02 * entropy)
    order = arrays["flow_elbo_rate"][-1].argsort()
    drawn = order[np.linspace(0, len(order) - 1, min(FLOWS, len(order))).round().astype(int)]
    for axis, name, title in zip(axes, ("elbo", "none"), ("ELBO", "ELBO without its KL"), strict=True):
        rate, distortion = arrays[f"flow_{name}_rate"], arrays[f"flow_{name}_distortion"]
        axis.fill_between([0, entropy], [entropy, 0], color="0.9", lw=0)
        axis.plot([0, most], [entropy, entropy - most], "--", color="black", lw=1.2)
        axis.plot(most, entropy - most, "_", color="black", ms=9, mew=1.2)
        ends = {"ls": "none", "clip_on": False, "zorder": 4, "color": PALETTE[3]}
        axis.plot(rate[-1], distortion[-1], marker=".", ms=2, alpha=0.5, label="ends of all", **ends)
        axis.plot(rate[:, drawn], distortion[:, drawn], color=PALETTE[0], lw=0.9, alpha=0.8)
        axis.plot(rate[0, drawn], distortion[0, drawn], "o", color=PALETTE[9], ms=3, label="start")
        axis.plot(rate[-1, drawn], distortion[-1, drawn], marker="o", ms=4, label="end", **ends)
        axis.set(title=title, xlabel="rate  E KL(q(z|x) ‖ p(z)), nats", xlim=(0, reach), ylim=(0, top))
    axes[0].set_ylabel("distortion  −E log p(x|z), nats")
    axes[0].text(0.17, 0.17, "impossible", color="0.45", fontsize=8)
    words = "rate + distortion = H(p):\nthe ELBO is the same all along\n(up to the bar)"
    place, words_at = (0.62 * entropy, 0.38 * entropy), (0.62 * entropy, 0.85 * entropy)
    line, box = {"arrowstyle": "-", "color": "black", "lw": 0.8}, {"color": "white", "alpha": 0.85, "pad": 1}
    axes[0].annotate(words, place, words_at, arrowprops=line, fontsize=8, bbox=box)
    axes[1].legend(loc="upper right")
    return figure


def survival(arrays: Arrays) -> Any:
    """The share of I left after climbing the ELBO from a decoder that ignores z. Arrays `survival_*`."""
    figure, axis = new(width=4.6, height=2.9)
    speeds = arrays["survival_speeds"]
    fine = np.geomspace(speeds[0], speeds[-1], 200)
    axis.plot(fine, (fine / (1 + fine)) ** 2, color="black", lw=1.2, label="(s / (1 + s))², no fit")
    labels = ("weak codes at the start", "strong codes at the start")
    for k, (shares, label) in enumerate(zip(arrays["survival_shares"], labels, strict=True)):
        low, middle, high = np.quantile(shares, [0.1, 0.5, 0.9], axis=1)
        bars, moved = np.stack([middle - low, high - middle]), speeds * (0.95, 1.05)[k]
        axis.errorbar(moved, middle, bars, fmt="os"[k], ms=4, lw=1, color=PALETTE[k], label=label)
    axis.set(xscale="log", ylim=(0, None), xlabel="s, step of the decoder / step of the encoder")
    axis.set_ylabel("I(x;z) left, share of the start's")
    axis.legend(loc="upper left")
    return figure


def convergence(arrays: Arrays) -> Any:
    """Distance to p(x) of the worst start for each code, with the prediction of (9). Arrays `chain_*`."""
    figure, axis = new(width=5.6, height=3.4)
    names = [name[6:] for name in arrays if name.startswith("chain_") and not name.endswith("_predicted")]
    for k, name in enumerate(names):
        distance, predicted = arrays[f"chain_{name}"], arrays[f"chain_{name}_predicted"]
        steps = np.arange(len(distance))
        visible = distance > 1e-9  # below that the distance is rounding
        axis.plot(steps[visible], distance[visible], color=PALETTE[k], lw=2.4, alpha=0.6)
        axis.plot(steps[visible], predicted[visible], ":", color="black", lw=1.2)
        last = np.flatnonzero(visible)[-1]
        shift = {"injective": 5, "hard bit": -3, "blur 4": 10}.get(name, 0)
        where = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
        axis.annotate(name, (steps[last], distance[last]), (4, shift), color=PALETTE[k], **where)
    axis.plot([], [], ":", color="black", lw=1.2, label="predicted by (9), no fit")
    axis.set(yscale="log", xlim=(0, len(distance) - 1), ylim=(1e-9, 2), xlabel="n, steps of the chain")
    axis.set_ylabel("TV distance to p(x), worst start")
    axis.legend(loc="lower right")
    return figure


def price(arrays: Arrays) -> Any:
    """q(x|z) of ever finer codes with the best factored Gaussians, and what these cost. Arrays `price_*`."""
    figure, axes = new(4, height=2.5, width=7.6, gridspec_kw={"width_ratios": [1, 1, 1, 0.9]})
    ground, counts = arrays["price_axis"], (1, 3, 6)
    for axis, count in zip(axes[:3], counts, strict=True):
        density = arrays["price_density"]
        groups = density.reshape(count, len(density) // count, *density.shape[1:]).sum(1)
        for k, q in enumerate(groups):
            levels = q.max() * np.array([0.05, 0.3, 0.7])
            axis.contour(ground, ground, q.T, levels=levels, colors=PALETTE[k], linewidths=0.8)
            turn = np.linspace(0, 2 * np.pi, 100)
            mean, std = arrays[f"price_{count}_fits"][k]
            axis.plot(mean[0] + 2 * std[0] * np.cos(turn), mean[1] + 2 * std[1] * np.sin(turn), "k--", lw=0.9)
            axis.plot(*mean, "k+", ms=6)
        axis.set(title="1 code" if count == 1 else f"{count} codes", xlabel="pixel 1", aspect="equal")
        axis.set(xlim=(-5, 5), ylim=(-5, 5), xticks=[-4, 0, 4], yticks=[-4, 0, 4])
    axes[0].set_ylabel("pixel 2")
    parts = np.stack([arrays[f"price_{count}_parts"] for count in counts])
    place = np.arange(len(counts))
    axes[3].bar(place, parts[:, 1], 0.6, color=PALETTE[0], label="correlation")
    axes[3].bar(place, parts[:, 0], 0.6, bottom=parts[:, 1], color=PALETTE[1], label="negentropy")
    axes[3].set(xticks=place, xticklabels=counts, xlabel="codes", ylabel="price, nats", ylim=(0, 1.45))
    axes[3].legend(loc="upper right")
    return figure


def amplification(arrays: Arrays) -> Any:
    """Error of the stationary distribution against the slowness of the chain, equal decoder error. Arrays `wrong_*`."""
    figure, axis = new(width=4.8, height=3.1)
    slow, apart, along = arrays["wrong_slowness"], arrays["wrong_apart"], arrays["wrong_along_slowest"] == 1
    order = np.argsort(slow)
    bound, first_order = np.minimum(arrays["wrong_bound"], 1)[order], arrays["wrong_first_order"][order]
    axis.plot(slow[order], bound, "--", color="black", lw=1.2, label="bound (10)")
    axis.plot(slow[order], first_order, ":", color="black", lw=1.4, label="first order (11)")
    axis.plot(slow[~along], apart[~along], "o", ms=3, alpha=0.6, color=PALETTE[0], label="random errors")
    axis.plot(slow[along], apart[along], "D", ms=5, color=PALETTE[3], label="error along the slowest eigenfunction")
    axis.set(xscale="log", yscale="log", xlabel="1 / (1 − τ), slowness of the chain", ylabel="TV(π, p)")
    axis.legend(loc="upper left")
    return figure
