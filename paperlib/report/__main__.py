"""What is recorded: as a page, as tables in the texts that quote it, and as a list of claims.

python -m paperlib.report               # write report/index.html and report/<notebook>.html
python -m paperlib.report tables        # write the marked blocks of README.md and of the notebooks
python -m paperlib.report claims        # list all claims, and compute their numbers again
"""

import argparse
from pathlib import Path

from paperlib.report import page, records, tables
from paperlib.system import files
from paperlib.system.errors import run_command


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "tables":
        return tables.update(options.check)
    if options.command == "claims":
        return records.show(options.list)
    print(page.write(options.to.resolve()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m paperlib.report", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    command = commands.add_parser("page", help="one page of everything recorded, that needs no network (default)")
    # A page is the default, so its option may stand without the command's name.
    for where, default in ((parser, files.ROOT / "report"), (command, argparse.SUPPRESS)):
        where.add_argument("--to", type=Path, default=default, metavar="FOLDER", help="for the page (default report/)")
    command = commands.add_parser("tables", help="carry recorded results into README.md and the notebooks")
    command.add_argument("--check", action="store_true", help="change nothing; exit 1 where a block is out of date")
    command = commands.add_parser(
        "claims", help="list all claims and compute their numbers again; exit 1 if any differ"
    )
    command.add_argument("--list", action="store_true", help="only show what is recorded")
    return parser


if __name__ == "__main__":
    run_command(main)
