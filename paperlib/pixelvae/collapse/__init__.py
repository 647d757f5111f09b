"""Notebook 05: posterior collapse with decoders of growing power, and the Markov chain, on MNIST."""

from paperlib.pixelvae.collapse import figures
from paperlib.pixelvae.collapse.claims import causes_table, ladder_table, routes_table, sweep_table
from paperlib.pixelvae.collapse.experiment import conclude, fit, load_images, measure, start

__all__ = [
    "causes_table", "conclude", "figures", "fit", "ladder_table", "load_images", "measure", "routes_table", "start",
    "sweep_table",
]  # fmt: skip
