"""`paramdiff plot`: one figure of a saved result, for a page or a paper."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from paramdiff_cli import options


class Kind(StrEnum):
    """What is drawn."""

    heatmap = "heatmap"
    layers = "layers"
    histogram = "histogram"
    spectrum = "spectrum"
    stripes = "stripes"
    adam = "adam"


Results = Annotated[
    list[str],
    typer.Argument(
        help="Directories that --out has written, then the figure: heatmap, layers, histogram, …", metavar="DIR… KIND"
    ),
]
Figure = Annotated[str, typer.Option("--output", "-o", help="File to write: .html, .png, .svg or .pdf.", metavar="FILE")]
Column = Annotated[
    str | None,
    typer.Option(help="heatmap, layers: the column. histogram: ulp, log2_abs_delta or log2_rel_delta.", metavar="NAME"),
]
By = Annotated[str | None, typer.Option(help="What a line stands for: kind, module, or of spectra layer.", metavar="KEY")]
Module = Annotated[str | None, typer.Option(help="Only this module; of heatmap, its experts one by one.", metavar="NAME")]
Width = Annotated[
    str, typer.Option(help="Of a picture: column (9 cm), text (18 cm) or pixels, 96 to the inch.", metavar="WIDTH")
]
Title = Annotated[str | None, typer.Option(help="Another title.")]


def plot(
    results: Results,
    output: Figure,
    column: Column = None,
    by: By = None,
    module: Module = None,
    width: Width = "text",
    title: Title = None,
    quiet: options.Quiet = False,
) -> None:
    """Draw one figure of what `--out` has saved: heatmap, layers, histogram, spectrum, stripes or adam.

    Several directories are drawn in one figure. Shares are drawn as the changed share, on a log scale.
    Pictures (.png, .svg, .pdf) need `pip install 'paramdiff[images]'` and Chrome or Chromium; .html needs neither.

    Examples:

        paramdiff sparsity base/ tuned/ --out out/

        paramdiff plot out/ heatmap -o heat.html

        paramdiff plot out/ heatmap --column rel_l2 -o heat.pdf --width column

        paramdiff plot sgd/ adamw/ sft/ layers -o layers.svg

        paramdiff plot out/ histogram --column ulp --by module -o ulp.png
    """
    import paramdiff
    from paramdiff import plots, wording
    from paramdiff.errors import OptionError
    from paramdiff.plots import style

    *directories, kind = results
    if kind not in list(Kind):
        raise OptionError(f"{kind[:60]!r} is no figure.", hint=f"End with one of {', '.join(Kind)}.")
    if not directories:
        raise OptionError("There is no result to draw.", hint=f"paramdiff plot DIR {kind} -o {output}")
    target = plots.checked(output, width)
    loaded = [paramdiff.load(directory) for directory in directories]
    fig = plots.of(kind)(loaded if len(loaded) > 1 else loaded[0], **arguments(Kind(kind), column, by, module))
    if title is not None:
        fig.update_layout(title={"text": style.safe(title, 200)})
    plots.save(fig, target, width)
    if not quiet:
        print(wording.printable(f"{target}: {fig.layout.meta['alt']}"))


TAKES = {
    Kind.heatmap: {"column": "column", "module": "module"},
    Kind.layers: {"column": "column"},
    Kind.histogram: {"column": "which", "by": "by"},
    Kind.spectrum: {"by": "by", "module": "module"},
    Kind.stripes: {"module": "module"},
    Kind.adam: {"by": "by"},
}


def arguments(kind: Kind, column: str | None, by: str | None, module: str | None) -> dict[str, Any]:
    """The options that were given, as the figure's function names them. Raises `OptionError` for one that it does not take.

    >>> arguments(Kind.histogram, "ulp", None, None)
    {'which': 'ulp'}
    """
    from paramdiff.errors import OptionError

    given = {name: value for name, value in (("column", column), ("by", by), ("module", module)) if value is not None}
    for name in given:
        if name not in TAKES[kind]:
            known = ", ".join(f"--{option}" for option in TAKES[kind])
            raise OptionError(f"{kind} takes no --{name}.", hint=f"It takes {known}.")
    return {TAKES[kind][name]: value for name, value in given.items()}
