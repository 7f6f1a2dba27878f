"""Commands that come in groups, `reca data ...` and `reca bench ...`. Only typer is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reca.commands.options import Device, Json, print_json

data_app = typer.Typer(help="Look at a data set before training on it.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure, with rivals side by side in one run.", no_args_is_help=True)


@data_app.command(
    "check", epilog="Example: `reca data check talk.jsonl --task image_to_text --model harmon/1.5b`"
)
def data_check(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="Folder of images or of tars, or one tar; a JSON or JSONL file of conversations; "
            "a folder of captioned images.",
        ),
    ],
    model: Annotated[
        str, typer.Option("--model", help="family/variant whose image sizes and tokens are estimated.")
    ] = "bagel/7b-mot",
    task: Annotated[
        str, typer.Option("--task", help="reconstruction, image_to_text or text_to_image.")
    ] = "reconstruction",
    root: Annotated[
        Path | None, typer.Option("--root", help="Folder that the images of conversations lie below.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Decode everything, explain every reject, find exact duplicates, estimate tokens and steps."""
    from reca.commands.data import check, render_check

    result = check(path, model, task=task, root=root)
    if as_json:
        print_json(result)
    else:
        render_check(result)


@data_app.command("preview", epilog="Example: `reca data preview photos --out preview.png`")
def data_preview(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder of images or of tars, or one tar.")],
    out: Annotated[Path, typer.Option("--out", help="PNG file to write.")] = Path("preview.png"),
    model: Annotated[
        str, typer.Option("--model", help="family/variant whose views are drawn.")
    ] = "bagel/7b-mot",
    images: Annotated[int, typer.Option("--images", min=1, max=64, help="Pictures to show.")] = 8,
    as_json: Json = False,
) -> None:
    """Draw what the model will see: the understanding view beside the target view."""
    from reca.commands.data import preview

    result = preview(path, model, out, images)
    if as_json:
        print_json(result)
    else:
        typer.echo(result["sheet"])


@bench_app.command("kernels", epilog="Example: `reca bench kernels --out kernels.jsonl --plot kernels.png`")
def bench_kernels(
    out: Annotated[Path, typer.Option("--out", help="JSON lines file; further runs are appended.")],
    operator: Annotated[
        list[str] | None,
        typer.Option("--operator", "--only", help="Only this one; may be given several times."),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bf16, fp16 or fp32; default bf16 on a GPU, else fp32.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Time torch.compile of the plain form too.")
    ] = True,
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.1, help="Begin nothing after this long.")
    ] = 7.0,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed windows per rival and mode.")] = 20,
    tune: Annotated[
        bool, typer.Option("--tune", help="Time other launch parameters; propose table entries.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="PNG of the fraction of the machine's ceiling.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Every operator at the shapes of real steps: right first, then how fast, against its rivals."""
    from reca.commands.bench import bench_kernels, is_failed, render_bench

    records = bench_kernels(
        out,
        operators=operator or (),
        device=device,
        dtype=dtype,
        compiled=compiled,
        minutes=minutes,
        rounds=rounds,
        tune=tune,
        plot=plot,
        note=lambda line: typer.echo(line, err=True),
    )
    if as_json:
        print_json(records)
    else:
        render_bench(records)
    if is_failed(records):
        raise typer.Exit(1)


@bench_app.command("compare", epilog="Example: `reca bench compare before.jsonl after.jsonl`")
def bench_compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="Results of an earlier run.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Results of a later run.")],
    as_json: Json = False,
) -> None:
    """Medians of two result files side by side, slowest first; rows whose spreads touch have not changed."""
    from reca.commands.bench import compare_files

    rows = compare_files(before, after)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        mark = "changed" if row["changed"] else "same"
        typer.echo(
            f"{row['ratio']:6.2f}x {mark:8} {row['operator']}: {row['case']}, "
            f"{row['provider']}, {row['mode']}: "
            f"{row['before_ms']:.4f} -> {row['after_ms']:.4f} ms"
        )
