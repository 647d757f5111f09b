import sys

from paperlib.report import page, records, tables
from paperlib.system.errors import UserError, run_command

COMMANDS = {"page": page.main, "tables": tables.main, "claims": records.main}


def main() -> int:
    name = sys.argv.pop(1) if sys.argv[1:] and not sys.argv[1].startswith("-") else "page"
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}: choose from {', '.join(COMMANDS)}")
    return COMMANDS[name]()


run_command(main)
