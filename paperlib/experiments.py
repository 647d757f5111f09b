"""All experiments, in the order of their notebooks."""

from paperlib.elbo.experiment import EXPERIMENT as ELBO
from paperlib.fuzziness.experiment import EXPERIMENT as FUZZINESS
from paperlib.pixelvae.collapse.experiment import EXPERIMENT as COLLAPSE
from paperlib.pixelvae.experiment import EXPERIMENT as PIXELVAE
from paperlib.sequential.experiment import EXPERIMENT as SEQUENTIAL

EXPERIMENTS = {experiment.notebook: experiment for experiment in (ELBO, FUZZINESS, SEQUENTIAL, PIXELVAE, COLLAPSE)}
