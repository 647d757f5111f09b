"""Log-probabilities and KL divergences in nats, one number per example, and draws.

They sum over all dimensions but the first: `(B, ...)` becomes `(B,)`. Stds are given by their logarithm. Parameters
broadcast to the shape of the argument (one std for all, one per dimension); anything else is a `ValueError`, because a
result that silently grew to `(B, B, ...)` would still sum to a plausible number.

The discretised mixture of logistics is the p(x|z) of PixelCNN++ (Salimans et al. 2017, section 2.1). Of one pixel

    p(x_1 .. x_C) = sum_k pi_k prod_c P_k(x_c | x_<c)
    P_k(x_c | x_<c) = F((x_c + h - m_kc) / s_kc) - F((x_c - h - m_kc) / s_kc),   F(t) = 1 / (1 + exp(-t))

where h is half a grey level, the darkest level also owns all below it and the brightest all above, and the mean m_kc
moves linearly with the channels before c. The parameters of a pixel stand in the order of the authors' code: K mixture
logits; then for each channel K means, K log-scales and, with three channels, K coefficients (tanh of them is what
multiplies: green by red, blue by red, blue by green).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from paperlib.system import distributed

LOG_2PI = math.log(2 * math.pi)
MIN_LOG_SCALE = -7.0  # of a logistic, the authors' limit: 1/9 of a grey level of 256


def gaussian_log_prob(x: Tensor, mean: Tensor | float, log_std: Tensor | float) -> Tensor:
    """log N(x; mean, exp(2 log_std)), a density: x `(B, ...)` to `(B,)`."""
    error = x - mean
    log_std = torch.as_tensor(log_std, dtype=error.dtype, device=x.device)
    scaled = error * torch.exp(-log_std)
    return _sum_per_example(-0.5 * (scaled.square() + LOG_2PI) - log_std, x.shape)


def discretized_gaussian_log_prob(x: Tensor, mean: Tensor, log_std: Tensor, *, levels: int) -> Tensor:
    """log P(x) of grey levels x `(B, ...)`, 0 .. levels - 1, under independent Gaussians in the same unit: `(B,)`.

    The mass of the bin from x - 1/2 to x + 1/2; the first and the last bin reach to infinity.
    """
    inverse = torch.exp(-log_std)
    below = torch.where(x <= 0, -math.inf, (x - 0.5 - mean) * inverse)
    above = torch.where(x >= levels - 1, math.inf, (x + 0.5 - mean) * inverse)
    flip = below + above > 0  # measured in the left tail, where no digits are lost
    low, high = torch.where(flip, -above, below), torch.where(flip, -below, above)
    top = torch.special.log_ndtr(high)
    return _sum_per_example(top + torch.log1p(-torch.exp(torch.special.log_ndtr(low) - top)), x.shape)


def gaussian_kl(mean: Tensor, log_std: Tensor | float) -> Tensor:
    """KL(N(mean, exp(2 log_std)) || N(0, I)): mean `(B, ...)` to `(B,)`."""
    twice = 2 * torch.as_tensor(log_std, dtype=mean.dtype, device=mean.device)
    # expm1 keeps the KL of an almost unused code right; exp(twice) - 1 would be mostly rounding.
    return _sum_per_example(0.5 * (mean.square() + (torch.expm1(twice) - twice)), mean.shape)


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x) of independent bits with p(x=1) = sigmoid(logits): x `(B, ...)`, of 0 and 1, to `(B,)`.

    Greys between give minus the cross entropy, as is usual for MNIST; that is not a log-probability.
    """
    return _sum_per_example(x * logits + F.logsigmoid(-logits), x.shape)


def sample_gaussian(mean: Tensor, log_std: Tensor | float, *, generator: torch.Generator | None = None) -> Tensor:
    """mean + exp(log_std) * noise in the shape of `mean`, differentiable; `generator` is on the device of `mean`."""
    noise = distributed.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    std = torch.exp(torch.as_tensor(log_std, dtype=mean.dtype, device=mean.device))
    if (sample := mean + std * noise).shape != mean.shape:
        raise ValueError(
            f"log_std does not broadcast to the mean's {tuple(mean.shape)}: the sample is {tuple(sample.shape)}"
        )
    return sample


def mix_logistic_size(mixtures: int, channels: int) -> int:
    """Parameters of one pixel: 10 a mixture for three channels, 3 for one. Raises `ValueError` for other numbers."""
    if channels not in (1, 3):
        raise ValueError(f"{channels} channels: the mixture of logistics takes 1 or 3")
    if mixtures < 1:
        raise ValueError(f"{mixtures} mixtures: there must be 1 or more")
    return mixtures * (1 + channels * _kinds(channels))


def discretized_mix_logistic_log_prob(x: Tensor, params: Tensor, *, levels: int = 256) -> Tensor:
    """log p(x): images x `(B, C, ...)` and params `(B, P, ...)` to `(B,)`.

    `x` holds grey levels k as 2 k / (levels - 1) - 1, with C of 1 or 3. P is K (1 + 2) or K (1 + 3 * 3), in the order
    above; half precision is widened. Exact in every bin, unlike the authors' code, which takes the density at the
    centre of a bin where probability is small. Raises `ValueError` for shapes that do not fit and for `levels` below 2.
    """
    params, channels = _widened(params), x.shape[1]
    mixtures = _mixtures(params, channels, levels)
    if x.shape[2:] != params.shape[2:] or len(x) != len(params):
        raise ValueError(f"parameters {tuple(params.shape)} do not fit images {tuple(x.shape)}")
    x = x.to(params.dtype).unsqueeze(2)
    parts = params[:, mixtures:].unflatten(1, (channels, _kinds(channels), mixtures))
    means, log_scales = parts[:, :, 0], parts[:, :, 1].clamp(min=MIN_LOG_SCALE)
    if channels == 3:
        green_red, blue_red, blue_green = parts[:, :, 2].tanh().unbind(1)
        red, green, _ = x.unbind(1)
        moved = [torch.zeros_like(green_red), green_red * red, blue_red * red + blue_green * green]
        means = means + torch.stack(moved, 1)
    half, inverse = 1 / (levels - 1), torch.exp(-log_scales)
    below_top = F.logsigmoid((x - means + half) * inverse)
    above_bottom = F.logsigmoid((means - x + half) * inverse)
    # F(b) - F(a) = F(b) F(-a) (1 - exp(a - b)), which loses no digits in the tails; b - a is the width of the bin.
    width = 2 * half * inverse
    log_width = torch.where(
        width > 1e-8, torch.log(-torch.expm1(-width.clamp(min=1e-8))), math.log(2 * half) - log_scales
    )
    inside = below_top + above_bottom + log_width
    # log P_k(x_c | x_<c), (B, C, K, ...)
    components = torch.where(x < half - 1, below_top, torch.where(x > 1 - half, above_bottom, inside))
    prior = torch.log_softmax(params[:, :mixtures], 1)
    return torch.logsumexp(prior + components.sum(1), 1)[..., None].flatten(1).sum(1)


def mix_logistic_noise(
    shape: tuple[int, ...],
    mixtures: int,
    channels: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """What decides a draw: `(B, ...)` to `(B, K + C, ...)`, K standard Gumbel and C standard logistic variables.

    Made in float64, for the tails; so one seed gives the same noise in every `dtype` but for rounding.
    """
    size = (shape[0], mixtures + channels, *shape[1:])
    u = torch.rand(size, generator=generator, dtype=torch.float64, device=device).clamp_(min=2**-54)
    gumbel, logistic = u[:, :mixtures], u[:, mixtures:]
    return torch.cat([-torch.log(-torch.log(gumbel)), torch.log(logistic) - torch.log1p(-logistic)], 1).to(dtype)


def sample_discretized_mix_logistic(params: Tensor, noise: Tensor, *, channels: int, levels: int = 256) -> Tensor:
    """x `(B, C, ...)` of `discretized_mix_logistic_log_prob`, from params `(B, P, ...)` and noise `(B, K + C, ...)`.

    The component is the greatest of logits plus Gumbel noise; each channel is its logistic, rounded to a grey level
    before the next channel sees it (the authors round at the end, which draws from another distribution). Raises
    `ValueError` as the log-probability does.
    """
    params, kinds, half = _widened(params), _kinds(channels), (levels - 1) / 2
    mixtures = _mixtures(params, channels, levels)
    if noise.shape != (len(params), mixtures + channels, *params.shape[2:]):
        raise ValueError(f"parameters {tuple(params.shape)} and noise {tuple(noise.shape)} do not fit")
    noise = noise.to(params.dtype)
    which = (params[:, :mixtures] + noise[:, :mixtures]).argmax(1, keepdim=True)
    # Rows of K: the logits, then mean, log-scale and perhaps coefficient of each channel.
    table = params.unflatten(1, (-1, mixtures))
    chosen = table.gather(2, which.unsqueeze(1).expand(-1, table.shape[1], *which.shape[1:])).squeeze(2)
    # Functions of all of `chosen`, though only part is used: over memory in one piece they are several times faster.
    scales = chosen.clamp(min=MIN_LOG_SCALE).exp_()[:, 2::kinds]
    # From here in units of grey levels, from 0.
    values = torch.addcmul(chosen[:, 1::kinds], scales, noise[:, mixtures:]).add_(1).mul_(half)
    red = values[:, 0].round_().clamp_(0, levels - 1)
    if channels == 3:
        green_red, blue_red, blue_green = chosen.tanh()[:, 3::kinds].unbind(1)
        _, green, blue = values.unbind(1)
        red = red - half
        green.addcmul_(green_red, red).round_().clamp_(0, levels - 1)
        blue.addcmul_(blue_red, red).addcmul_(blue_green, green - half).round_().clamp_(0, levels - 1)
    return values.mul_(1 / half).sub_(1)


def bits_per_dim(nats: Tensor | float, dims: int) -> Tensor | float:
    """Nats per example as bits per dimension: nats / (dims log 2), sign kept.

    `nats` is -log p(x) for the usual positive number, `dims` 32 * 32 * 3 for CIFAR-10. Raises `ValueError` below 1.
    """
    if dims < 1:
        raise ValueError(f"bits per dimension of {dims} dimensions")
    return nats / (dims * math.log(2))


def _sum_per_example(terms: Tensor, shape: torch.Size) -> Tensor:
    if terms.shape != shape:
        raise ValueError(f"parameters do not broadcast to {tuple(shape)}: the terms are {tuple(terms.shape)}")
    return terms.flatten(1).sum(1) if terms.ndim > 1 else terms


def _kinds(channels: int) -> int:
    """Means and log-scales, and for three channels coefficients."""
    return 3 if channels == 3 else 2


def _widened(params: Tensor) -> Tensor:
    return params.float() if params.dtype in (torch.bfloat16, torch.float16) else params


def _mixtures(params: Tensor, channels: int, levels: int) -> int:
    """K of parameters `(B, P, ...)`."""
    mixtures, rest = divmod(params.shape[1], mix_logistic_size(1, channels))
    if rest or not mixtures:
        raise ValueError(f"parameters {tuple(params.shape)} do not fit {channels} channels")
    if levels < 2:
        raise ValueError(f"{levels} grey levels: there must be 2 or more")
    return mixtures
