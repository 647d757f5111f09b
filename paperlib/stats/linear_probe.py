"""What a linear classifier can read from features."""

import numpy as np
import torch

from paperlib.stats.intervals import Points

PENALTY = 0.01  # of the squared weights


def linear_probe(train: Points, train_labels: Points, test: Points, test_labels: Points) -> np.ndarray:
    """Which test examples a linear classifier of the features gets right: bool (n_test,).

    Multinomial logistic regression on features (n, d), each standardised on `train`, in float32, with a penalty of
    `PENALTY` / 2 times the squared weights on the mean cross entropy. Labels are (n,) integers. Deterministic. Raises
    `ValueError` for shapes that do not fit, labels of one class only, and features that are not finite.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    (x, y), (x_test, y_test) = _labelled(train, train_labels), _labelled(test, test_labels)
    if x.shape[1] != x_test.shape[1]:
        raise ValueError(f"{x.shape[1]} features to learn from, but {x_test.shape[1]} to test on")
    scaler = StandardScaler(copy=False).fit(x)
    # This tolerance, of the gradient, is where accuracy on CIFAR-10's pixels stands still.
    model = LogisticRegression(C=1 / (PENALTY * len(x)), tol=1e-3, max_iter=1000).fit(scaler.transform(x), y)
    return model.predict(scaler.transform(x_test)) == y_test


def _labelled(features: Points, labels: Points) -> tuple[np.ndarray, np.ndarray]:
    """Features in float32, in memory of their own, and labels, checked."""
    x, y = (v.detach().cpu().numpy() if torch.is_tensor(v) else np.asarray(v) for v in (features, labels))
    x = np.array(x, dtype=np.float32)
    if x.ndim != 2 or y.shape != x.shape[:1] or 0 in x.shape:
        raise ValueError(f"features are (n, d) and labels (n,), not {x.shape} and {y.shape}")
    if not np.isfinite(x).all():
        raise ValueError("features hold values that are not finite")
    return x, y
