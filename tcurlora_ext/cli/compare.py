"""`tcurlora compare`: methods compared over seeds and numbers of training subjects, in tables, figures and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tcurlora_ext.cli import options
from tcurlora_ext.cli import training_options as training
from tcurlora_ext.cli.finetune import METHODS_HELP, finetune, method_names, settings_of
from tcurlora_ext.io.table import terminal


@training.with_options_of(finetune, but=("method",))
def compare(
    ctx: typer.Context,
    run: training.Run = None,
    output: Annotated[
        Path, typer.Option(help="Folder of the comparison: new, or an earlier one, of which what is missing is run.")
    ] = Path("runs/compare"),
    methods: Annotated[str, typer.Option("--methods", "--method", help=METHODS_HELP)] = "all",
    shots: Annotated[
        options.Words | None,
        typer.Option(
            parser=options.words,
            metavar="SETS",
            help="What is trained on, with commas between: numbers of subjects, drawn from the training list by "
            "--data-seed, fewer among more; names of other lists in splits.json; or all.",
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The method that the others are tested against. Default: lora, else the first.")
    ] = None,
    subject_file: Annotated[
        Path | None,
        typer.Option(help="JSON file with the subject of each case, for the tests. Default: by --subject-pattern."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure time and memory of steps side by side after the training.")
    ] = False,
    **others: Any,
) -> None:
    """Compare methods over seeds and numbers of training subjects; run what is missing, and nothing twice.

    Ends with one table, paired tests over subjects, and a report.html that needs no other file.
    """
    from tcurlora_ext.segmentation.comparing.comparing import compare as start
    from tcurlora_ext.segmentation.comparing.settings import CompareSettings
    from tcurlora_ext.segmentation.runs.settings import read_settings
    from tcurlora_ext.segmentation.terminal import Display

    folder, from_there = training.run_folder(ctx, run, output, others["resume"])
    earlier = read_settings(folder, "compare", CompareSettings) if from_there else None
    given = {**others, "training_sets": shots, "reference": reference, "subject_file": subject_file, "measure": measure}
    settings = settings_of(CompareSettings, given, method_names(methods, others["factors"]), earlier)
    if earlier is not None:
        settings = training.resumed(earlier, settings, ctx, {"training_sets": "shots", "shots": "none"})
    training.say_unused(ctx, settings)
    with training.going_on("compare", folder):
        start(settings, folder, display=Display(terminal()))
