"""Fuzziness against blurs and spectra that are known."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits

from paperlib.stats import sharpness
from paperlib.stats.sharpness import edge_width, power_spectrum, spectral_slope


def blurred(image, *stds):
    return torch.from_numpy(np.stack([gaussian_filter(np.asarray(image, float), s) if s else image for s in stds]))


def half_plane(angle, size=64):
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return (x * math.cos(math.radians(angle)) + y * math.sin(math.radians(angle)) > 0).astype(float)


def line(width, size=64):
    image = np.zeros((size, size))
    image[:, size // 2 : size // 2 + width] = 1
    return image


@pytest.fixture(scope="module")
def digits():
    """Twenty crisp digits, 48 x 48: scikit-learn's, black and white, each pixel made a block of 4 x 4."""
    small = load_digits().images[:20] > 7
    return np.pad(np.kron(small, np.ones((4, 4))), ((0, 0), (8, 8), (8, 8)))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# Edge width


def slow_edge_width(image):
    """Equation (a) with loops, for one grey image."""
    total = weighted = 0.0
    for view in (image, image.T):
        across = np.gradient(view, axis=0)
        for row, beside in zip(view, across, strict=True):
            ramps, direction = [], 0
            for i in range(len(row) - 1):
                d = row[i + 1] - row[i]
                gradient = math.sqrt(d**2 + ((beside[i] + beside[i + 1]) / 2) ** 2)
                if d and d * direction <= 0:
                    ramps.append([])
                    direction = d
                if d:  # a plateau is steep on no ramp, though grey levels beside it may change
                    ramps[-1].append((d, gradient))
            for ramp in ramps:
                width = abs(sum(d for d, _ in ramp)) / max(g for _, g in ramp)
                weight = sum(d**2 / g for d, g in ramp)
                total += weight
                weighted += weight * width
    return weighted / total


def test_edge_width_is_equation_1(rng, monkeypatch):
    images = np.stack([gaussian_filter(rng.normal(size=(9, 13)), s) for s in (0.3, 0.7, 1, 1.5, 2)])
    images[:, 2:5, 3:8] = images[:, 2:3, 3:4]  # flat within rows and columns,
    images[1:3, :, :2] = images[3:, :, -3:] = 0  # and at their ends
    expected = [slow_edge_width(image) for image in images]
    np.testing.assert_allclose(edge_width(torch.from_numpy(images)), expected, rtol=1e-12)
    monkeypatch.setattr(sharpness, "PIXELS", 2 * 9 * 13)  # blocks of 2, 2 and 1
    np.testing.assert_allclose(edge_width(torch.from_numpy(images)), expected, rtol=1e-12)


def test_edge_width_does_not_change_in_mirrors(rng):
    """Grey levels with many plateaus, at both ends of ramps."""
    images = torch.from_numpy(rng.integers(0, 4, (200, 7, 9)).astype(np.uint8))
    width = edge_width(images)
    assert float((width / width.mean() - 1).abs().max()) > 0.01
    for mirrored in (images.flip(1), images.flip(2), images.flip(1, 2), images.mT, images.rot90(1, (1, 2))):
        torch.testing.assert_close(edge_width(mirrored), width, rtol=1e-12, atol=0)


@pytest.mark.parametrize("angle", [0, 10, 22.5, 45, 70, 90])
def test_edge_width_of_a_straight_edge_is_root_two_pi_stds(angle):
    stds = np.array([1, 1.5, 2, 3])
    ratio = edge_width(blurred(half_plane(angle), *stds)).numpy() / (math.sqrt(2 * math.pi) * stds)
    assert (abs(ratio - 1) < [0.07, 0.05, 0.04, 0.04]).all()


def test_edge_width_of_a_thin_line_is_root_e_stds():
    stds = np.array([2, 3, 4, 6])
    widths = edge_width(blurred(line(1), *stds)).numpy()
    bump = np.exp(-((np.arange(64) / stds[:, None]) ** 2) / 2)
    np.testing.assert_allclose(widths, 1 / -np.diff(bump).min(1), rtol=1e-3)  # as sampled at the pixels
    np.testing.assert_allclose(widths[2:], math.sqrt(math.e) * stds[2:], rtol=0.025)


def test_edge_width_of_crisp_edges_is_one_pixel_or_less(digits):
    assert edge_width(blurred(half_plane(0), 0)).item() == 1
    assert edge_width(blurred(half_plane(45), 0)).item() == pytest.approx(2 / math.sqrt(5), rel=0.02)
    widths = edge_width(torch.from_numpy(digits))
    assert ((widths > 0.85) & (widths <= 1)).all()


def test_edge_width_knows_neither_contrast_nor_ink():
    crisp, faint = np.zeros((40, 40)), np.zeros((40, 40))
    crisp[8:32, 8:12] = 1
    faint[8:32, 26:30] = 0.3
    images = torch.from_numpy(np.stack([gaussian_filter(i, 1) for i in (crisp, crisp + faint, np.fliplr(crisp))]))
    width = edge_width(images)
    torch.testing.assert_close(width, width[:1].expand(3), rtol=1e-3, atol=0)  # a faint stroke is no wider
    for changed in (0.01 * images, 250 * images - 90, 1 - images, images.mT, images.flip(1)):
        torch.testing.assert_close(edge_width(changed), width, rtol=1e-10, atol=0)
    gray = (255 * images).round().to(torch.uint8)
    torch.testing.assert_close(edge_width(gray), width, rtol=0.02, atol=0)


def test_edge_width_pools_channels(rng):
    red, blue = blurred(half_plane(0), 1, 3)
    both = edge_width(torch.stack([red, blue])[None]).item()
    narrow, wide = edge_width(torch.stack([red, blue])).tolist()
    assert both == pytest.approx((narrow + wide) / 2, rel=0.01)  # both have the same total variation
    assert edge_width(torch.stack([red, 0 * red])[None]).item() == pytest.approx(narrow, rel=1e-12)


def test_an_image_without_edges_has_no_width():
    widths = edge_width(torch.stack([torch.full((5, 5), 0.3), torch.eye(5)]))
    assert widths.dtype == torch.float64 and widths.isnan().tolist() == [True, False]


# Spectra


def field(exponent, size, rng, count=1):
    """Periodic random images whose power falls as frequency^-exponent."""
    cycles = np.fft.fftfreq(size)
    distance = np.hypot(cycles[:, None], cycles)
    distance[0, 0] = np.inf
    noise = np.fft.fft2(rng.normal(size=(count, size, size)))
    return torch.from_numpy(np.fft.ifft2(noise * distance ** (-exponent / 2)).real)


@pytest.mark.parametrize("size", [7, 8])
def test_power_spectrum_against_explicit_sums(rng, size, monkeypatch):
    images = rng.normal(size=(3, 2, size, size)) + 4
    ramp = (1 - np.cos(2 * np.pi * (np.arange(size) + 0.5) / size)) / 2
    taper = np.outer(ramp, ramp)
    y, x = np.mgrid[:size, :size]
    rings = {k: [] for k in range(1, size // 2 + 1)}
    for u in range(-((size - 1) // 2), size // 2 + 1):
        for v in range(-((size - 1) // 2), size // 2 + 1):
            wave = np.exp(-2j * np.pi * (u * y + v * x) / size)
            centred = images - images.mean((2, 3), keepdims=True)
            power = (np.abs((centred * taper * wave).sum((2, 3))) ** 2).mean(1) / (taper**2).sum()
            if round(math.hypot(u, v)) in rings:
                rings[round(math.hypot(u, v))].append((math.hypot(u, v) / size, power))
    monkeypatch.setattr(sharpness, "PIXELS", 2 * 2 * size**2)  # blocks of 2 and 1
    frequencies, power = power_spectrum(torch.from_numpy(images))
    np.testing.assert_allclose(frequencies, [np.mean([f for f, _ in ring]) for ring in rings.values()], rtol=1e-12)
    expected = np.stack([np.mean([p for _, p in ring], axis=0) for ring in rings.values()], axis=1)
    np.testing.assert_allclose(power, expected, rtol=1e-10)


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
def test_the_slope_of_power_law_images(rng, exponent):
    whole = field(exponent, 128, rng, count=8)
    assert spectral_slope(whole[:, :64, :64]).mean().item() == pytest.approx(-exponent, abs=0.15)


def test_blur_lowers_the_slope(digits):
    slopes = np.stack([spectral_slope(blurred(digit, 0, 0.5, 1, 1.5)).numpy() for digit in digits])
    assert (np.diff(slopes, axis=1) < -0.3).all()


def test_the_slope_does_not_know_contrast(digits):
    images = torch.from_numpy(digits)
    slope = spectral_slope(images)
    for changed in (0.01 * images, 200 * images + 30, 1 - images, images.mT):
        torch.testing.assert_close(spectral_slope(changed), slope, rtol=1e-8, atol=0)
    colour = images[:, None].repeat(1, 3, 1, 1)
    torch.testing.assert_close(spectral_slope(colour), slope, rtol=1e-10, atol=0)
    assert spectral_slope(torch.ones(2, 8, 8)).isnan().all()


@pytest.mark.parametrize("measure", [edge_width, power_spectrum, spectral_slope])
def test_shapes_that_are_refused(measure):
    for shape in ((8, 8), (2, 3, 4, 8, 8), (0, 8, 8)):
        with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
            measure(torch.ones(shape))
    with pytest.raises(ValueError, match="1 x 1 pixels"):
        measure(torch.ones(3, 1, 1))
    if measure is not edge_width:
        with pytest.raises(ValueError, match="square"):
            measure(torch.ones(3, 8, 9))


def test_spectra_do_not_change_in_mirrors(rng):
    """A window that is higher on one side weighs it more: for white noise of 8 x 8 that moved slopes by up to 0.8."""
    images = torch.from_numpy(rng.normal(size=(20, 3, 8, 8)))
    power = power_spectrum(images)[1]
    for mirrored in (images.flip(-1), images.flip(-2), images.mT, images.rot90(1, (2, 3))):
        torch.testing.assert_close(power_spectrum(mirrored)[1], power, rtol=1e-9, atol=0)
