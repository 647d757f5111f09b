"""Log-probabilities and KL divergences, in nats, one number per example.

Every function sums over all dimensions but the first, so `(B, ...)` becomes `(B,)`. Deviations are
given by their logarithm. Parameters may be of smaller shape (one deviation for all, one per
dimension) as long as they broadcast to the shape of the argument; anything else is a `ValueError`,
because a result that silently grew to `(B, B, ...)` would still sum to a plausible number.

These are the terms of the ELBO: log p(x|z), and KL(q(z|x) || p(z)) with p(z) = N(0, I).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LOG_2PI = math.log(2 * math.pi)


def gaussian_log_prob(x: Tensor, mean: Tensor | float, log_std: Tensor | float) -> Tensor:
    """log N(x; mean, exp(2 log_std)), a density in nats: `(B, ...)` to `(B,)`.

    `mean` and `log_std` broadcast to the shape of `x`. Raises `ValueError` where they do not.
    """
    log_std = torch.as_tensor(log_std, dtype=_float_type(x, mean), device=x.device)
    scaled = (x - mean) * torch.exp(-log_std)
    return _sum_per_example(-0.5 * (scaled.square() + LOG_2PI) - log_std, x.shape)


def gaussian_kl(mean: Tensor, log_std: Tensor | float) -> Tensor:
    """KL(N(mean, exp(2 log_std)) || N(0, I)) in nats: `(B, ...)` to `(B,)`.

    `log_std` broadcasts to the shape of `mean`. Raises `ValueError` where it does not.
    """
    twice = 2 * torch.as_tensor(log_std, dtype=_float_type(mean), device=mean.device)
    # expm1 keeps the KL of an almost unused code right; exp(twice) - 1 would be mostly rounding.
    return _sum_per_example(0.5 * (mean.square() + (torch.expm1(twice) - twice)), mean.shape)


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x) of independent bits with p(x=1) = sigmoid(logits), in nats: `(B, ...)` to `(B,)`.

    `x` holds 0 and 1. Greys between give minus the cross entropy, as is usual for MNIST; that is
    not a log-probability. `logits` broadcasts to the shape of `x`, and large ones do not overflow.
    Raises `ValueError` for other shapes.
    """
    return _sum_per_example(x * logits + F.logsigmoid(-logits), x.shape)


def sample_gaussian(
    mean: Tensor,
    log_std: Tensor | float,
    *,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """mean + exp(log_std) * noise in the shape of `mean`, differentiable in both parameters.

    `noise`, of the shape of `mean`, is drawn from `generator` (on the device of `mean`) unless it
    is given. Raises `ValueError` when the shapes do not fit, or when both are given.
    """
    if noise is None:
        noise = torch.randn(mean.shape, generator=generator, dtype=_float_type(mean), device=mean.device)
    elif generator is not None:
        raise ValueError("give either noise or a generator, not both")
    std = torch.exp(torch.as_tensor(log_std, dtype=_float_type(mean), device=mean.device))
    if (sample := mean + std * noise).shape != mean.shape:
        raise ValueError(
            f"deviation and noise do not broadcast to the mean's {tuple(mean.shape)}: "
            f"the sample is {tuple(sample.shape)}"
        )
    return sample


def bits_per_dim(nats: Tensor | float, dims: int) -> Tensor | float:
    """Nats per example as bits per dimension: nats / (dims log 2), sign kept.

    `nats` is -log p(x) for the usual positive number; `dims` counts the dimensions of one example
    (32 * 32 * 3 for CIFAR-10). Raises `ValueError` for `dims` below 1.
    """
    if dims < 1:
        raise ValueError(f"bits per dimension of {dims} dimensions")
    return nats / (dims * math.log(2))


def _float_type(*tensors: Tensor | float) -> torch.dtype:
    """The floating type in which these meet, torch's default where none is floating."""
    result = None
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            result = torch.promote_types(result, tensor.dtype) if result else tensor.dtype
    return result or torch.get_default_dtype()


def _sum_per_example(terms: Tensor, shape: torch.Size) -> Tensor:
    if terms.shape != shape:
        raise ValueError(f"parameters do not broadcast to {tuple(shape)}: the terms are {tuple(terms.shape)}")
    return terms.flatten(1).sum(1) if terms.ndim > 1 else terms
