"""`coterie train | generate | export | inspect | tune`.

What a user got wrong, or asked too much of the memory, is one line on stderr and exit code 2; an interrupt leaves the
last checkpoint and exits with 130. Everything heavy is imported by the command that needs it.
"""

import contextlib
import difflib
import io
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Annotated

COMMANDS = ("train", "generate", "export", "inspect", "tune")

# What to do about a lack of memory, by command.
_LESS_MEMORY = {
    "train": "make --batch-size or --length smaller or --accumulation larger, or take a smaller --preset",
    "generate": "make --max-new-tokens smaller, the prompt shorter, or take a smaller model",
    "export": "take a smaller model",
    "inspect": "make --length smaller, or take a smaller model",
    "tune": "take a smaller model",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (`sys.argv` if None) and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a table's rule must not fail in an ASCII terminal
    argv = list(sys.argv[1:] if argv is None else argv)
    command = f"coterie {argv[0]}" if argv and argv[0] in COMMANDS else "coterie"
    if argv == ["--version"]:
        from coterie import __version__

        print(f"coterie {__version__}")
        return 0
    try:
        options = parse(argv)
        if options is None:
            return 0
        from coterie import cli_commands

        return getattr(cli_commands, f"run_{argv[0]}")(options)
    except KeyboardInterrupt as interrupt:
        return _complain(command, str(interrupt) or "interrupted", 130)
    except BrokenPipeError:
        # Whoever read the output has seen enough; the interpreter must not fail again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FloatingPointError as error:
        return _complain(command, str(error), 1)
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if _is_lack_of_memory(error):
            what = f"not enough memory: {_LESS_MEMORY[argv[0]]}"
        elif isinstance(error, RuntimeError):  # no mistake of the user's
            raise
        else:
            what = _one_line(str(error)) or type(error).__name__
        if sys.flags.dev_mode:  # python -X dev -m coterie ...: for whoever looks for the cause
            raise
        return _complain(command, what, 2)


def parse(argv: Sequence[str]) -> object | None:
    """The chosen command's options; None if all was said by printing the help.

    Raises:
        ValueError: the command line is wrong; the message is one line.
    """
    if not argv or (argv[0] not in COMMANDS and argv[0] not in ("-h", "--help")):
        accepted = f"one of {', '.join(COMMANDS)} (see coterie --help)"
        if not argv:
            raise ValueError(f"no command, must be {accepted}")
        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        raise ValueError(
            f"unknown command {argv[0]!r}, " + (f"did you mean {close[0]!r}?" if close else f"must be {accepted}")
        )

    import tyro

    from coterie.cli_options import Export, Generate, Inspect, Train, Tune

    about = "Compact sparse transformers: train one beside a twin, let it write, run it elsewhere, count its costs."
    commands = None
    for name, options in zip(COMMANDS, (Train, Generate, Export, Inspect, Tune), strict=True):
        subcommand = Annotated[options, tyro.conf.subcommand(name)]
        commands = subcommand if commands is None else commands | subcommand
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                commands,
                prog="coterie",
                description=about,
                args=list(argv),
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            return None
        raise ValueError(f"{_condensed(said.getvalue())} (see coterie {argv[0]} --help)") from None


def _condensed(box: str) -> str:
    """tyro's box of an error as one line: what is wrong and what may have been meant."""
    # The first line is the box's title. Without UTF-8 the box is drawn with blanks, its rules with hyphens.
    lines = [re.sub(r"^[│╰]|[│╯]$", "", line) for line in box.splitlines()[1:]]
    lines = textwrap.dedent("\n".join(line.rstrip() for line in lines)).splitlines()
    parts: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r" *[─-]{3,}", line):
            parts.append([])
        elif line and not line.startswith(" " * 8):  # deeper: the help of an option that was named
            parts[-1].append(line.strip())
    parts = [part for part in parts if part]
    what = " ".join(parts[0]).rstrip(".").removesuffix(". Expected 1 values")
    for part in parts[1:]:
        if part[0].startswith("Perhaps you meant"):
            options = [line.split()[0] for line in part[1:] if line.startswith("-")]
            what += f"; did you mean {' or '.join(dict.fromkeys(options))}?" if options else ""
    return what[:1].lower() + what[1:]


def _is_lack_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a CPU or a GPU, or was of more bytes than 64 bits can count."""
    # torch has a type of its own for a GPU's only.
    told = "out of memory|DefaultCPUAllocator|Storage size calculation overflowed"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(re.search(told, str(error))))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _complain(command: str, what: str, code: int) -> int:
    print(f"{command}: {what}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
