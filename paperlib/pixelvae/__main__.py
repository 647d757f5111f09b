from paperlib.pixelvae.experiment import EXPERIMENT
from paperlib.runs import launch

launch.main(EXPERIMENT)
