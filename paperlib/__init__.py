"""The library behind the notebooks that reproduce "Towards Deeper Understanding of Variational Autoencoding Models".

Zhao, Song, Ermon, arXiv 1702.08658. Each notebook has a package of its own, those of 02 to 04 with the same modules;
what they share is in `data`, `nn`, `stats`, `runs` and `system`. docs/library.md draws the tree.
"""

from typing import Any


def load_pretrained(name: str, device: str = "auto") -> Any:
    """The best recorded model of "fuzziness", "sequential" or "pixelvae" (notebooks 02 to 04), without a data set.

    All have `sample(count, seed)`, uint8 images (count, S, S, C), and `decode(z)`; see the classes that
    `paperlib.pretrained.MODELS` names for what else each can do. Raises `UserError` for another name.
    """
    from paperlib import pretrained

    return pretrained.load(name, device)
