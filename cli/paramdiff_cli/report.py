"""`paramdiff report`: everything on one page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paramdiff_cli import options, sink

if TYPE_CHECKING:
    from paramdiff import Diff, Moments

Refs = Annotated[
    list[str],
    typer.Argument(help="BASE and TUNED checkpoints; or directories that --out has written.", metavar="BASE TUNED…"),
]
Page = Annotated[str, typer.Option("--output", "-o", help="The page to write.", metavar="FILE.html")]
States = Annotated[
    list[str] | None,
    typer.Option("--adam", help="Optimizer state to show too: a checkpoint, or what `adam --out` wrote; may be repeated."),
]
DEFAULT = "change,magnitude,rows,spectrum"
Measures = Annotated[
    str | None,
    typer.Option(
        "--measures",
        help=f"What to measure, {DEFAULT} by default: spectrum takes longest and can be left out, subspace added.",
        metavar="A,B,…",
    ),
]
Title = Annotated[str | None, typer.Option(help="Heading of the page; by default what was compared.")]


def report(
    refs: Refs,
    output: Page,
    tol: options.Tol = None,
    measures: Measures = None,
    method: options.MethodOption = options.Method.exact,
    adam: States = None,
    title: Title = None,
    device: options.Device = "auto",
    include: options.Include = None,
    exclude: options.Exclude = None,
    renames: options.Map = None,
    download: options.Download = False,
    out: options.Out = None,
    quiet: options.Quiet = False,
    threads: options.Threads = None,
) -> None:
    """Everything on one page: verdict, heat maps, profiles, histograms, spectra, stripes, all tensors. Works offline.

    Several tuned checkpoints stand side by side against one base. The page is one file with nothing to fetch.

    Examples:

        paramdiff report base/ tuned/ -o report.html --tol 1e-5

        paramdiff report base/ rl-sgd/ rl-adamw/ sft/ -o runs.html

        paramdiff report base/ tuned/ -o report.html --measures change,magnitude,rows

        paramdiff report base/ checkpoint-500/ -o report.html --adam checkpoint-500/

        paramdiff report out/ -o report.html
    """
    import paramdiff
    from paramdiff import wording
    from paramdiff.errors import OptionError, OutputError
    from paramdiff.output import is_result

    if Path(output).suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"{output[:80]}: a report is a page.", hint="Name it .html.")
    if Path(output).is_dir():  # to be said before anything is measured
        raise OutputError(f"Cannot write {output}: Is a directory.", hint="Nothing there was changed.")
    saved = [is_result(ref) for ref in refs]
    results: list[Diff | Moments]
    if all(saved):
        given = (("--tol", tol), ("--include", include), ("--exclude", exclude), ("--map", renames), ("--out", out))
        asked = next((name for name, value in (*given, ("--measures", measures)) if value), None)
        if asked is not None:
            raise OptionError(f"{asked} is for checkpoints, and {refs[0][:80]} has been measured.", hint="Leave it out.")
        results = [paramdiff.load(ref) for ref in refs]
    elif any(saved):
        raise OptionError(
            f"{refs[saved.index(True)][:80]} is a saved result, and {refs[saved.index(False)][:80]} a checkpoint.",
            hint="Give BASE and TUNED, or saved results only.",
        )
    elif len(refs) < 2:
        raise OptionError(f"There is nothing to compare {refs[0][:80]} with.", hint="Give BASE and TUNED.")
    else:
        results = [
            sink.compared(
                refs[0],
                tuned,
                quiet=quiet,
                out=_place(out, refs[1:], number),
                download=download,
                tolerances=tol or [],
                device=device,
                include=include or [],
                exclude=exclude or [],
                renames=renames or [],
                method=method.value,
                **options.chosen(measures or DEFAULT),
                threads=threads,
            )
            for number, tuned in enumerate(refs[1:])
        ]
    results += [_state(ref, quiet, threads, device) for ref in adam or []]
    paramdiff.write_report(output, results, title=title)
    if not quiet:
        size = Path(output).stat().st_size / 1e6
        print(f"{wording.printable(output)}: {size:.1f} MB, complete in itself; open it in a browser")


def _place(out: str | None, tuned: list[str], number: int) -> str | None:
    """Where the tables of one of several comparisons go: directories of their own below `--out`."""
    from paramdiff.wording import labels

    if out is None or len(tuned) == 1:
        return out
    names = [re.sub(r"[^\w.@-]+", "_", label).strip("._") or "run" for label in labels(tuned)]
    name = names[number] if names.count(names[number]) == 1 else f"{names[number]}-{number + 1}"
    return str(Path(out) / name)


def _state(ref: str, quiet: bool, threads: int | None, device: str) -> Any:
    import paramdiff
    from paramdiff.output import is_result

    if is_result(ref):
        return paramdiff.load(ref)
    with sink.progress_bar(quiet, "reading") as progress:
        found = paramdiff.adam(ref, threads=threads, device=device, progress=progress)
    if not quiet:
        sink.warn(found.run["warnings"])
    return found
