"""The `paramdiff` command: its subcommands, and how errors become one sentence and an exit code.

Exit codes: 0 done; 1 a check the user asked for failed; 2 bad input or usage; 3 nothing could be compared; 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from paramdiff_cli import inspect, layers, sparsity

app = typer.Typer(
    name="paramdiff",
    help="See what training did to the weights: exact, streaming comparison of two model checkpoints.",
    epilog="Example: paramdiff sparsity base/ tuned/ --tol 1e-5",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command("sparsity")(sparsity.sparsity)
app.command("layers")(layers.layers)
app.command("inspect")(inspect.inspect)


def _print_version(wanted: bool) -> None:
    if wanted:
        from paramdiff import __version__

        typer.echo(f"paramdiff {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if debug:
        os.environ["PARAMDIFF_DEBUG"] = "1"


def main() -> None:
    """Run the command; every expected error ends as one sentence on stderr."""
    # "paramdiff sparsity … --debug" is what people type when something failed.
    if "--debug" in sys.argv[1:]:
        sys.argv = [sys.argv[0], "--debug", *(arg for arg in sys.argv[1:] if arg != "--debug")]
    try:
        app()
    except KeyboardInterrupt:
        _fail("Interrupted; nothing was written.", 130)
    except BrokenPipeError:  # `paramdiff … | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(0) from None
    except Exception as error:
        from paramdiff.errors import NothingToCompare, ParamdiffError

        if not isinstance(error, (ParamdiffError, MemoryError, OSError)):
            raise
        _fail(str(error) or "Out of memory.", 3 if isinstance(error, NothingToCompare) else 2)


def _fail(sentence: str, code: int) -> None:
    if os.environ.get("PARAMDIFF_DEBUG"):
        raise
    print(f"paramdiff: {sentence}", file=sys.stderr)
    raise SystemExit(code) from None
