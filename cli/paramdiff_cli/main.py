"""The `paramdiff` command: its subcommands, and how errors become one sentence and an exit code.

Exit codes: 0 done; 1 a check the user asked for failed; 2 bad input or usage; 3 nothing could be compared; 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, NoReturn

import typer

from paramdiff import wording
from paramdiff_cli import adam, inspect, layers, plan, plot, published, rank, report, sparsity, subspace

app = typer.Typer(
    name="paramdiff",
    help="See what training did to the weights: exact, streaming comparison of two model checkpoints.",
    epilog="Example: paramdiff sparsity base/ tuned/ --tol 1e-5",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with every expected failure turned into one sentence on stderr and an exit code.

    This has to happen inside typer, which would otherwise end Ctrl-C without a word and a closed pipe with code 1.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt:
            _fail("Interrupted; no half result was left behind.", 130)
        except BrokenPipeError:  # `paramdiff … | head`: the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        except (MemoryError, OSError) as error:
            _fail(str(error) or "Out of memory.", 2)
        except Exception as error:
            from paramdiff.errors import NothingToCompare, ParamdiffError

            if not isinstance(error, ParamdiffError):
                raise
            _fail(str(error), 3 if isinstance(error, NothingToCompare) else 2)

    return run


COMMANDS = (
    sparsity.sparsity,
    layers.layers,
    rank.rank,
    subspace.subspace,
    adam.adam,
    report.report,
    plot.plot,
    inspect.inspect,
    plan.plan,
    published.published,
)
for command in COMMANDS:
    app.command(command.__name__)(guarded(command))


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
    """Run the command line."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: 2>&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long-lived as the stream it stands in for
        getattr(sys, name).reconfigure(errors="replace")  # a terminal without UTF-8 gets question marks, not a traceback
    # "paramdiff sparsity … --debug" is what people type when something failed.
    if "--debug" in sys.argv[1:]:
        sys.argv = [sys.argv[0], "--debug", *(arg for arg in sys.argv[1:] if arg != "--debug")]
    app()


def _fail(sentence: str, code: int) -> NoReturn:
    if os.environ.get("PARAMDIFF_DEBUG"):
        import traceback

        traceback.print_exc()
    print(f"paramdiff: {wording.printable(sentence)}", file=sys.stderr)
    raise SystemExit(code) from None
