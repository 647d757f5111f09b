from paperlib.data.datasets import main
from paperlib.system.errors import run_command

run_command(main)
