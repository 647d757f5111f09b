"""Move a code by two sliders and see what it decodes to, and what q(x|z) is made of."""

import io
from typing import Any

import ipywidgets
import numpy as np
import torch
from PIL import Image

from paperlib.data import datasets
from paperlib.stats import aggregate_posterior

MAGNIFIED = 4  # screen pixels per pixel
SHOWN = 8  # training digits


class Explorer(ipywidgets.VBox):
    """Two sliders for z, and below them in one row: mu(z), E_q[x|z], the deviation of q(x|z), its heaviest digits.

    `x` (N, pixels) in [0, 1] and `labels` (N,) are the training points in the order of `codes`; `decode` maps z (1, D)
    to the decoder's mean (1, pixels); `shape` is (height, width). Dimensions beyond the second are 0.
    """

    def __init__(
        self, decode: Any, codes: aggregate_posterior.Codes, x: torch.Tensor, labels: torch.Tensor, shape: Any
    ) -> None:
        self._decode, self._codes, self._x, self._labels, self._shape = decode, codes, x, labels, shape
        self.sliders = [
            ipywidgets.FloatSlider(value, min=-3, max=3, step=0.05, description=f"$z_{k}$", continuous_update=False)
            for k, value in ((1, 0.0), (2, 0.0))
        ]
        self.picture = ipywidgets.Image(format="png")
        self.text = ipywidgets.HTML()
        super().__init__([ipywidgets.HBox(self.sliders), self.picture, self.text])
        for slider in self.sliders:
            slider.observe(self._update, names="value")
        self._update()

    def __repr__(self) -> str:
        return "two sliders that move z, and what the code stands for (shown where the notebook is running)"

    @torch.no_grad()
    def _update(self, change: Any = None) -> None:
        z = torch.zeros(1, self._codes.mean.shape[1], device=self._x.device)
        z[0, 0], z[0, 1] = (slider.value for slider in self.sliders)
        found = aggregate_posterior.conditional(z, self._codes, self._x, self._labels)
        points, weights = aggregate_posterior.heaviest(z, self._codes, SHOWN)
        row = torch.cat([self._decode(z).double(), found.mean, 2 * found.variance.sqrt(), self._x[points[0]].double()])
        self.picture.value = _png(row.reshape(-1, *self._shape))
        mixture = found.labels[0]
        best = [f"{k}: {mixture[k]:.0%}" for k in mixture.argsort(descending=True)[:4].tolist() if mixture[k] > 0.01]
        digits = ", ".join(
            f"{label} ({weight:.1%})"
            for label, weight in zip(self._labels[points[0]].tolist(), weights[0].tolist(), strict=True)
        )
        self.text.value = (
            f"From left to right: &mu;(z), E<sub>q</sub>[x|z], deviation (white: 0.5), then the heaviest training "
            f"digits: {digits}.<br>tr Var<sub>q</sub>[x|z] {found.trace[0]:.1f}, effective sample size "
            f"{found.ess[0]:.1f}, labels {', '.join(best)}."
        )


def _png(images: torch.Tensor) -> bytes:
    """Images (N, H, W) in [0, 1] side by side, as the bytes of a PNG."""
    grey = datasets.from_unit(images[:, None])[..., 0]
    sheet = np.concatenate([np.pad(image, 1, constant_values=128) for image in grey], axis=1)
    sheet = sheet.repeat(MAGNIFIED, 0).repeat(MAGNIFIED, 1)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="png")
    return buffer.getvalue()
