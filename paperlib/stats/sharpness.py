"""How fuzzy single images are, whatever their brightness.

`edge_width`, in pixels. A ramp is a stretch of a row or column over which the grey level never falls, or never rises.
Its width is its height h over the steepest gradient g on it; an image's edge width is the mean over all ramps, by the
part w of the image's gradient that each carries. With sums and maximum over the ramp's steps d from pixel to pixel,

    (a)  sum_ramps w h / g  /  sum_ramps w,   h = sum |d|,  g = max |grad|,  w = sum d^2 / |grad|

The gradient counts where d is not 0, so that a mirror image, whose plateaus come first, has the same ramps. The weights
make it the same for all directions, as d_x^2 + d_y^2 = |grad|^2. A straight edge blurred by a Gaussian of
std s has width sqrt(2 pi) s, a thin line sqrt(e) s. A faint stroke with crisp borders is crisp. Noise breaks ramps up:
this is for smooth images.

`spectral_slope`, of log power against log frequency, lower where high frequencies are missing: about -2.8 for MNIST's
digits. It tells blurs apart up to a std of about two pixels; beyond, power that leaks from low frequencies holds it up.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

PIXELS = 2**21  # handled at a time: 16 MiB in float64
LEAST = torch.finfo(torch.float64).tiny  # in place of a gradient of 0, so that 0 / 0 is 0


@torch.no_grad()
def edge_width(images: Tensor) -> Tensor:
    """The mean width of the ramps of each image, equation (a): (N, H, W) or (N, C, H, W) to (N,), pixels, float64.

    It does not change with contrast or sign. 1 is the least that a straight edge along rows or columns can have.
    Channels are pooled. nan for an image without any ramp. Raises `ValueError` for another shape and for images of less
    than 2 x 2 pixels.
    """
    sums = [torch.stack(_ramps(x)) + torch.stack(_ramps(x.mT)) for x in _blocks(images, least=2)]
    weight, weighted = torch.cat(sums, 1)
    return weighted / weight


def _ramps(x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the ramps along the rows of `x` (B, C, H, W), and these times the widths, each summed to (B,)."""
    step = x.diff(dim=-1)
    across = torch.gradient(x, dim=-2)[0]
    slope = torch.hypot(step, (across[..., 1:] + across[..., :-1]) / 2)
    sign = step.sign()
    moves = torch.where(sign != 0, torch.arange(sign.shape[-1], device=x.device), 0).cummax(-1).values
    sign = sign.gather(-1, moves)  # where it is flat, that of the last step that was not
    begins = torch.ones_like(sign, dtype=torch.bool)
    begins[..., 1:] = sign[..., 1:] != sign[..., :-1]
    ramp = begins.flatten().cumsum(0) - 1
    none = step.new_zeros(int(ramp[-1]) + 1)
    height = none.index_add(0, ramp, step.abs().flatten())
    steep = torch.where(step != 0, slope, 0.0)  # a plateau is part of the ramps on both sides, and steep on neither
    steepest = none.scatter_reduce(0, ramp, steep.flatten(), "amax")
    width = (height / steepest.clamp(min=LEAST))[ramp].reshape(step.shape)
    weight = step.square() / slope.clamp(min=LEAST)
    return weight.flatten(1).sum(1), (weight * width).flatten(1).sum(1)


@torch.no_grad()
def power_spectrum(images: Tensor) -> tuple[Tensor, Tensor]:
    """Radially averaged power of square images: (N, S, S) or (N, C, S, S) to frequencies (K,) and power (N, K).

    Frequencies are in cycles per pixel, power in the squared unit of the images, both float64. Annulus k = 1 .. K holds
    the two-dimensional frequencies whose distance from 0 rounds to k / S, up to K = S // 2, the Nyquist frequency; its
    frequency is their mean distance. White noise has its variance as power everywhere (7 % less in the first annulus).
    The mean of each channel is taken out first; channels are averaged. A Hann window hides borders that do not match.

    Raises `ValueError` for another shape and for images of less than 4 x 4 pixels.
    """
    blocks = _blocks(images, least=4)
    size = images.shape[-1]
    if images.shape[-2] != size:
        raise ValueError(f"a radial spectrum is for square images, not {tuple(images.shape)}")
    cycles = torch.fft.fftfreq(size, dtype=torch.float64, device=images.device)
    distance = torch.hypot(cycles[:, None], cycles).flatten()
    annulus = (size * distance).round().long()
    inside = (annulus >= 1) & (annulus <= size // 2)
    member = torch.nn.functional.one_hot(annulus[inside] - 1).double()
    member /= member.sum(0)  # (frequencies inside, K): a product with it averages over each annulus

    centres = (torch.arange(size, dtype=torch.float64, device=images.device) + 0.5) / size
    taper = torch.sin(math.pi * centres).square()  # Hann's window, as high on the left as on the right
    taper = taper[:, None] * taper
    results = []
    for x in blocks:
        x = (x - x.mean((-2, -1), keepdim=True)) * taper
        power = torch.fft.fft2(x).abs().square().mean(1) / taper.square().sum()
        results.append(power.flatten(1)[:, inside] @ member)
    return distance[inside] @ member, torch.cat(results)


def spectral_slope(images: Tensor) -> Tensor:
    """Slope of log power against log frequency: square images (N, S, S) or (N, C, S, S) to (N,), float64.

    A least-squares line through all annuli of `power_spectrum`, which leave out the mean and the corners. It does not
    change with contrast. nan for an image without power at some frequency, such as a constant one. Raises as there.
    """
    frequencies, power = power_spectrum(images)
    x = frequencies.log()
    x = x - x.mean()
    slope = power.log() @ x / x.square().sum()
    return torch.where(slope.isfinite(), slope, torch.nan)


def _blocks(images: Tensor, least: int) -> Iterator[Tensor]:
    """The images as (B, C, H, W) in float64, some at a time, if they are of at least `least` x `least` pixels."""
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(f"images are (N, H, W) or (N, C, H, W), not {tuple(images.shape)}")
    if min(images.shape[-2:]) < least:
        raise ValueError(f"images of {images.shape[-2]} x {images.shape[-1]} pixels: it takes {least} x {least}")
    images = images[:, None] if images.ndim == 3 else images
    return (block.double() for block in images.detach().split(max(1, PIXELS // images[0].numel())))
