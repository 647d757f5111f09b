from paperlib.pixelvae.experiment import NOTEBOOK, PRESETS, start
from paperlib.pixelvae.model import fit, load_images
from paperlib.runs import launch

launch.main(NOTEBOOK, PRESETS, start, lambda run: fit(run, load_images(run)))
