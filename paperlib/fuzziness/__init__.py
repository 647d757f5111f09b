"""Notebook 02: fuzzy samples as averages of q(x|z)."""

from paperlib.fuzziness import figures
from paperlib.fuzziness.claims import controls
from paperlib.fuzziness.experiment import conclude, explore, fit, load_images, measure, start
from paperlib.runs.run import save_animation, save_figure

__all__ = [
    "conclude", "controls", "explore", "figures", "fit", "load_images", "measure", "save_animation", "save_figure",
    "start",
]  # fmt: skip
