"""A data set on the device that trains, or left on disk."""

import torch

from paperlib.data import datasets, device_images


def test_a_large_training_set_stays_on_disk_and_gives_the_same_batches(monkeypatch):
    dataset = datasets.load("digits")
    resident = device_images.load(dataset, "cpu")
    monkeypatch.setattr(device_images, "MOST_BYTES", dataset.train.images.nbytes - 1)
    left = device_images.load(dataset, "cpu")
    assert torch.is_tensor(resident.train) and left.train is dataset.train.images
    rows = torch.tensor([5, 900, 5, 0])
    assert torch.equal(left.batch(rows), resident.batch(rows))
