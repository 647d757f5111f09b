"""Notebook 04, a PixelVAE on CIFAR-10 and its Markov chain; `collapse` is notebook 05, the same model on MNIST."""

from paperlib.pixelvae import collapse, figures
from paperlib.pixelvae.claims import sweep_table, table
from paperlib.pixelvae.experiment import conclude, continue_chain, fit, load_images, measure, start
from paperlib.runs.run import save_figure

__all__ = [
    "collapse", "conclude", "continue_chain", "figures", "fit", "load_images", "measure", "save_figure",
    "start", "sweep_table", "table",
]  # fmt: skip
