"""Notebook 01: the ELBO seen from the encoder's side, on models small enough for every statement to be exact."""

from paperlib.elbo import figures, finite
from paperlib.elbo.experiment import conclude, measure, start, verdict
from paperlib.elbo.measurements import leaking_bit, terms
from paperlib.runs.run import save_figure

__all__ = ["conclude", "figures", "finite", "leaking_bit", "measure", "save_figure", "start", "terms", "verdict"]
