"""`paramdiff adam`: would SGD have done the same?"""

from __future__ import annotations

from typing import Annotated

import typer

from paramdiff_cli import options, sink

Checkpoint = Annotated[
    str,
    typer.Argument(help="Checkpoint with optimizer state: a trainer's directory, or the file of the state.", metavar="CKPT"),
]
Other = Annotated[
    str | None,
    typer.Argument(help="Another one to set beside it, or the save of the next step of the same run.", metavar="OTHER"),
]
Weights = Annotated[
    str | None, typer.Option("--weights", help="Where the weights lie, if not beside the state.", metavar="REF")
]
OtherWeights = Annotated[
    str | None, typer.Option("--other-weights", help="The same for the second checkpoint.", metavar="REF")
]
Lr = Annotated[float | None, typer.Option("--lr", help="Learning rate in force, instead of what the files say.")]
Gradient = Annotated[
    bool, typer.Option("--gradient", help="Insist on the gradient between two saves: fail where they are not consecutive.")
]


def adam(
    checkpoint: Checkpoint,
    other: Other = None,
    weights: Weights = None,
    other_weights: OtherWeights = None,
    lr: Lr = None,
    gradient: Gradient = False,
    device: options.Device = "auto",
    include: options.Include = None,
    exclude: options.Exclude = None,
    renames: options.Map = None,
    out: options.Out = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    threads: options.Threads = None,
) -> None:
    """What did Adam do with the gradients, and would SGD have done the same? (arXiv 2602.07729)

    From the saved optimizer state: the second moment, the effective learning rate and its spread, the size of the step and
    how much of it bf16 weights would show; adaptivity (0: SGD with momentum would have gone the same way) and the SGD
    learning rate nearest to it. Two checkpoints are set side by side; if the second is the next step of the first, the
    gradient is recovered.

    Examples:

        paramdiff adam checkpoint-500/

        paramdiff adam rl/checkpoint-500/ sft/checkpoint-500/

        paramdiff adam checkpoint-499/ checkpoint-500/ --gradient
    """
    import paramdiff

    with sink.progress_bar(quiet, "reading") as progress:
        found = paramdiff.adam(
            checkpoint,
            other,
            weights=weights,
            other_weights=other_weights,
            lr=lr,
            gradient=gradient,
            include=include or [],
            exclude=exclude or [],
            renames=renames or [],
            device=device,
            threads=threads,
            progress=progress,
        )
    if not quiet:
        sink.warn(found.run["warnings"])
    if out is not None:
        found.save(out)
    if json:
        sink.print_json(found.summary() | sink.moments(found))
    elif not quiet:
        from paramdiff_cli import render_moments

        render_moments.show(sink.console(), found, out)
