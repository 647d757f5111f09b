"""A small training that draws noise, and what tests of the loop, of checkpoints and of several processes ask of it."""

import dataclasses

import torch
from torch import nn

from paperlib.runs.train import Recipe, fit
from paperlib.system import distributed

DATA = torch.randn(37, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
BASE = Recipe(steps=20, batch_size=8, learning_rate=0.01, ema=0.9, evaluate_every=4)
OFTEN = dataclasses.replace(BASE, checkpoint_minutes=0)


def network():
    """A float64 model with noise (dropout) and buffers (batch norm's, one of them an integer)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.3), nn.Tanh(), nn.Linear(9, 6)
        return nn.Sequential(*parts).double()


def loss(model, x, progress):
    error = (model(x + 0.1 * torch.randn_like(x)) - x).square().sum(1).mean()
    return (0.5 + progress.fraction) * error, {"error": error, "twice": 2.0 * progress.step}


def evaluate(model):
    x = DATA[:9]
    return {"error": (model(x + torch.randn_like(x)) - x).square().mean(), "other": 7}


def batch(indices):
    return DATA[indices]


def run(folder, recipe=BASE, model=None, **changes):
    settings = {"loss": loss, "batch": batch, "evaluate": evaluate, "count": len(DATA), "seed": 3, "device": "cpu"}
    return fit(model or network(), recipe=recipe, directory=folder, **settings | changes)


def load(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def leaves(value, path=""):
    """The values in nested dicts and lists, by path."""
    if not isinstance(value, (dict, list, tuple)):
        return {path: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, item in pairs for k, v in leaves(item, f"{path}/{key}").items()}


def assert_same(a, b):
    """Equal bit for bit, but for the wall time and the provenance of resumed parts."""
    a, b = leaves(a), leaves(b)
    ignored = {k for k in a | b if k == "/state/elapsed" or k.startswith("/state/provenance")}
    assert a.keys() - ignored == b.keys() - ignored
    for key in a.keys() - ignored:
        if torch.is_tensor(a[key]):
            assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key
        else:
            assert a[key] == b[key], key


class Killed(Exception):
    pass


def killed_at(step):
    """A batch function that dies at the given step of a training."""
    steps = iter(range(step))

    def dying(indices):
        if next(steps, None) is None:
            raise Killed
        return batch(indices)

    return dying


def run_noisily(folder, **changes):
    """A training with noise and dropout that belong to samples, and a term over the whole batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), distributed.Dropout(0.2), nn.Linear(9, 6)).double()

    def loss(model, x, progress):
        noise = distributed.randn(x.shape, dtype=x.dtype)
        moved = distributed.randint(3, (len(x), 1)) + distributed.rand((len(x), 1), dtype=x.dtype)
        y = model(x + 0.1 * noise * moved)
        every = distributed.gathered(y)
        return (y - x).square().sum(1).mean() + (every.T @ every / len(every)).square().mean(), {
            "pixel": x.mean(),
            "all": distributed.mean(y.mean()),
        }

    return run(folder, OFTEN, model, loss=loss, **changes)
