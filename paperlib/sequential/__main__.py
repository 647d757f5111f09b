from paperlib.runs import launch
from paperlib.sequential.experiment import EXPERIMENT

launch.main(EXPERIMENT)
