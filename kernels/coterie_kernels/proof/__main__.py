"""`python -m coterie_kernels.proof COMMAND`: proofs of the kernels that need no GPU."""

import sys

import tyro

from coterie_kernels.proof.check import Check
from coterie_kernels.proof.matrix import Compile

COMMANDS = {"compile": Compile, "check": Check}


def main() -> None:
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="coterie_kernels.proof", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    )
    sys.exit(1 if command.run() else 0)


if __name__ == "__main__":
    main()
