"""Move a code by sliders and see what it decodes to, and what q(x|z) is made of."""

import io
from typing import Any

import ipywidgets
import numpy as np
import torch
from PIL import Image

from paperlib.data import datasets
from paperlib.fuzziness import figures
from paperlib.fuzziness.model import VAE, encode, square
from paperlib.stats import aggregate_posterior

MAGNIFIED = 4  # screen pixels per pixel
SHOWN = 8  # training digits


class Explorer(ipywidgets.VBox):
    """Two sliders for z, and below them in one row: mu(z), E_q[x|z], the std of q(x|z), its heaviest digits.

    `x` (N, P) in [0, 1] and `labels` (N,) are the training images; codes have two dimensions.
    """

    def __init__(self, vae: VAE, x: torch.Tensor, labels: torch.Tensor) -> None:
        self._vae, self._codes, self._x, self._labels = vae, encode(vae, x), x, labels
        span = {"min": -3, "max": 3, "step": 0.05, "continuous_update": False}
        self.sliders = [ipywidgets.FloatSlider(0.0, description=f"$z_{k}$", **span) for k in (1, 2)]
        self.picture, self.text = ipywidgets.Image(format="png"), ipywidgets.HTML()
        super().__init__([ipywidgets.HBox(self.sliders), self.picture, self.text])
        for slider in self.sliders:
            slider.observe(self._update, names="value")
        self._update()

    def __repr__(self) -> str:
        return "two sliders that move z, and what the code stands for (shown where the notebook is running)"

    @torch.no_grad()
    def _update(self, change: Any = None) -> None:
        z = torch.tensor([[slider.value for slider in self.sliders]], device=self._x.device)
        conditional = aggregate_posterior.conditional(z, self._codes, self._x, self._labels)
        points, weights = aggregate_posterior.heaviest(z, self._codes, SHOWN)
        decoded, std = self._vae.p_x_given_z(z).double(), conditional.variance.sqrt()
        row = torch.cat([decoded, conditional.mean, 2 * std, self._x[points[0]].double()])
        self.picture.value = _png(square(row))
        mixture = conditional.labels[0]
        best = [f"{k}: {mixture[k]:.0%}" for k in mixture.argsort(descending=True)[:4].tolist() if mixture[k] > 0.01]
        heaviest = zip(self._labels[points[0]].tolist(), weights[0].tolist(), strict=True)
        digits = ", ".join(f"{label} ({weight:.1%})" for label, weight in heaviest)
        self.text.value = (
            f"From left to right: &mu;(z), E<sub>q</sub>[x|z], standard deviation (white: 0.5), then the heaviest "
            f"training digits: {digits}.<br>tr Var<sub>q</sub>[x|z] {conditional.trace[0]:.1f}, effective sample size "
            f"{conditional.ess[0]:.1f}, labels {', '.join(best)}."
        )


class Walk(ipywidgets.VBox):
    """A slider for the place in the recorded walk, and the picture of `figures.walk` there."""

    def __init__(self, arrays: figures.Arrays) -> None:
        self._frames = figures.walk(arrays)
        self.slider = ipywidgets.IntSlider(0, max=len(self._frames) - 1, description="place")
        self.picture = ipywidgets.Image(format="png")
        super().__init__([self.slider, self.picture])
        self.slider.observe(self._update, names="value")
        self._update()

    def __repr__(self) -> str:
        return "a slider for the place in the walk above (shown where the notebook is running)"

    def _update(self, change: Any = None) -> None:
        buffer = io.BytesIO()
        self._frames[self.slider.value].save(buffer, format="png")
        self.picture.value = buffer.getvalue()


def _png(images: torch.Tensor) -> bytes:
    """Images (N, H, W) in [0, 1] side by side, as the bytes of a PNG."""
    grey = datasets.from_unit(images[:, None])[..., 0]
    sheet = np.concatenate([np.pad(image, 1, constant_values=128) for image in grey], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(sheet.repeat(MAGNIFIED, 0).repeat(MAGNIFIED, 1)).save(buffer, format="png")
    return buffer.getvalue()
