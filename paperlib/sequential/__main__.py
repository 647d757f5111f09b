from paperlib.runs import launch
from paperlib.sequential.experiment import NOTEBOOK, PRESETS, start
from paperlib.sequential.training import fit, load_images

launch.main(NOTEBOOK, PRESETS, start, lambda run: fit(run, load_images(run)))
