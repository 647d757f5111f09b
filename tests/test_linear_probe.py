"""Linear probes against Newton's method and features whose answer is known."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from paperlib.stats.linear_probe import linear_probe


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def three_classes(rng, count):
    """Two features of very different size, one constant; overlapping classes."""
    y = rng.integers(3, size=count)
    x = np.stack([y + rng.normal(size=count), 1e-3 * (y == 1) + 5e-4 * rng.normal(size=count), np.full(count, 7.0)], 1)
    return x, y


def slow_probe(x, y, x_test, y_test, penalty):
    """Newton's method on the same objective, dense."""
    scale = x.std(0)
    x, x_test = ((part - x.mean(0)) / np.where(scale == 0, 1, scale) for part in (x, x_test))
    x, x_test = (torch.from_numpy(np.hstack([part, np.ones((len(part), 1))])) for part in (x, x_test))
    target, shape = torch.from_numpy(y), (int(y.max()) + 1, x.shape[1])

    def objective(flat):
        weights = flat.reshape(shape)
        entropy = torch.nn.functional.cross_entropy(x @ weights.T, target)
        return entropy + penalty / 2 * weights[:, :-1].square().sum()

    flat = torch.zeros(shape).double().flatten()
    for _ in range(10):
        gradient = torch.autograd.functional.jacobian(objective, flat)
        flat = flat - torch.linalg.pinv(torch.autograd.functional.hessian(objective, flat)) @ gradient
    assert torch.autograd.functional.jacobian(objective, flat).abs().max() < 1e-8
    return (x_test @ flat.reshape(shape).T).argmax(1).numpy() == y_test


def test_the_probe_is_newtons(rng):
    train, test = three_classes(rng, 200), three_classes(rng, 2000)
    given = train[0].astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        right = linear_probe(*map(torch.from_numpy, (given, train[1], *test)))
    assert np.array_equal(given, train[0].astype(np.float32)), "the caller's features stay as they were"
    assert right.dtype == bool and (right == slow_probe(*train, *test, 0.01)).mean() > 0.998
    assert (right == slow_probe(*train, *test, 0.1)).mean() < 0.995  # so the penalty is seen
    some = test[1] == 2  # the scale is that of the training features, whatever is tested
    np.testing.assert_array_equal(linear_probe(*train, test[0][some], test[1][some]), right[some])


def test_features_that_are_refused(rng):
    x, y = three_classes(rng, 20)
    for message, *wrong in [
        (r"\(n, d\)", x[0], y, x, y),
        (r"\(n, d\)", x, y[:19], x, y),
        (r"\(n, d\)", x, y[:, None], x, y),
        ("to test on", x, y, x[:, :2], y),
        ("finite", x, y, x * math.nan, y),
        ("class", x, 0 * y, x, y),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_probe(*wrong)
