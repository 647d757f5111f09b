from paperlib.pixelvae.collapse.experiment import EXPERIMENT
from paperlib.runs import launch

launch.main(EXPERIMENT)
