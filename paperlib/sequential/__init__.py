"""Notebook 03: a sequential VAE on LSUN bedrooms."""

from paperlib.runs.run import save_figure
from paperlib.sequential import figures
from paperlib.sequential.claims import codes_table, table
from paperlib.sequential.experiment import conclude, draw_more, fit, load_images, measure, start

__all__ = [
    "codes_table",
    "conclude",
    "draw_more",
    "figures",
    "fit",
    "load_images",
    "measure",
    "save_figure",
    "start",
    "table",
]
