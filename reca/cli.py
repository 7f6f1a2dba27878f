"""The `reca` console script: thin. Each command parses its arguments, calls `reca.commands`, prints and
exits.

Only typer is imported here, so that `--help` answers at once; a command imports torch when it runs. An error
of the user's is one or two lines and an exit code of `reca.errors`; `--debug`, anywhere, shows the traceback.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="reca",
    help="Reconstruction Alignment (RecA) post-training for unified multimodal models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Try it now: `reca train quickstart`. Add `--debug` to any command to see a traceback.",
)
data_app = typer.Typer(help="Look at a data set before training on it.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")
]
Source = Annotated[
    str, typer.Argument(metavar="WEIGHTS_OR_RUN", help="Folder of official weights, or a run folder.")
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="family/variant of a weights folder; a run folder knows its own."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for the PNG files and the contact sheet.")]
Steps = Annotated[int | None, typer.Option("--steps", min=2, help="Points of the sampler's time grid.")]
TextGuidance = Annotated[
    float | None, typer.Option("--text-guidance", min=1, help="Text guidance scale; 1 is off.")
]
ImageGuidance = Annotated[
    float | None, typer.Option("--image-guidance", min=1, help="Image guidance scale; 1 is off.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the starting noise.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


@app.command(
    epilog="Example: `reca train bagel-7b --weights BAGEL-7B-MoT --data photos optim.lr=2e-5 steps=500`"
)
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a YAML file with `extends: NAME`.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Folder of images or of tars, or one tar.")
    ] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="Folder of the starting weights.")] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Run folder; default runs/RECIPE, numbered if taken.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", help="`auto`, or the path of one checkpoint.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the closing lines.")] = False,
    as_json: Json = False,
) -> None:
    """Post-train a model by reconstruction alignment; everything lands in the run folder."""
    from reca.commands.train import train_recipe

    extra = {"data.path": data, "weights": weights}
    summary = train_recipe(
        recipe,
        overrides or [],
        extra={key: value for key, value in extra.items() if value is not None},
        run=run,
        resume=resume,
        quiet=quiet or as_json,
    )
    if as_json:
        _print_json(summary)


@app.command(epilog='Example: `reca sample runs/quickstart --prompt "a red bicycle" --out pictures`')
def sample(
    source: Source,
    prompt: Annotated[list[str], typer.Option("--prompt", help="Text to draw; may be given several times.")],
    model: Model = None,
    out: Out = Path("samples"),
    size: Annotated[
        str | None, typer.Option("--size", help="HEIGHTxWIDTH in pixels; default the model's own.")
    ] = None,
    steps: Steps = None,
    text_guidance: TextGuidance = None,
    image_guidance: ImageGuidance = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Text to image."""
    from reca.commands.sample import sample_prompts

    options = {"steps": steps, "text_guidance": text_guidance, "image_guidance": image_guidance, "seed": seed}
    _finish(
        sample_prompts(source, prompt, model=model, out=out, size=size, options=options, device=device),
        as_json,
    )


@app.command(epilog="Example: `reca reconstruct runs/quickstart photo.jpg --out pictures`")
def reconstruct(
    source: Source,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures to reconstruct.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Instruction; default one of the shipped templates.")
    ] = None,
    model: Model = None,
    out: Out = Path("samples"),
    steps: Steps = None,
    text_guidance: TextGuidance = None,
    image_guidance: ImageGuidance = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Image -> understanding embeddings -> image: what RecA optimises, made visible."""
    from reca.commands.sample import reconstruct_images

    options = {"steps": steps, "text_guidance": text_guidance, "image_guidance": image_guidance, "seed": seed}
    _finish(
        reconstruct_images(source, images, prompt, model=model, out=out, options=options, device=device),
        as_json,
    )


@app.command(epilog='Example: `reca edit runs/mine photo.jpg --prompt "make it winter" --out pictures`')
def edit(
    source: Source,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures to edit.")],
    prompt: Annotated[str, typer.Option("--prompt", help="The instruction.")],
    model: Model = None,
    out: Out = Path("samples"),
    steps: Steps = None,
    text_guidance: TextGuidance = None,
    image_guidance: ImageGuidance = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Instruction editing: the picture's latents, its embeddings and the text condition the result."""
    from reca.commands.sample import edit_images

    options = {"steps": steps, "text_guidance": text_guidance, "image_guidance": image_guidance, "seed": seed}
    _finish(
        edit_images(source, images, prompt, model=model, out=out, options=options, device=device), as_json
    )


def _finish(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(result)
    else:
        for path in [*result["images"], result["sheet"]]:
            typer.echo(path)


@app.command(epilog="Example: `reca verify tests/data/parity/bagel/*`")
def verify(
    packs: Annotated[
        list[Path], typer.Argument(metavar="PACK...", help="Pack folders, or folders that hold packs.")
    ],
    as_json: Json = False,
) -> None:
    """Run parity packs: loss, named activations and every gradient against the official code's tensors."""
    from reca.commands import verify as command

    results = command.verify(packs)
    if as_json:
        _print_json(command.records(results))
    else:
        typer.echo(command.render(results))
    raise typer.Exit(0 if all(result.passed for result in results) else 1)


@app.command(epilog="Example: `reca doctor --json`, or `reca doctor --compile` after changing a kernel")
def doctor(
    compile_kernels: Annotated[
        bool,
        typer.Option("--compile", help="Build every Triton kernel for every architecture; needs no GPU."),
    ] = False,
    as_json: Json = False,
) -> None:
    """What this machine has, which attention back ends and kernels will be used, and why not the others."""
    from reca.commands import doctor as command

    if compile_kernels:
        rows = command.compile_kernels()
        _print_json(rows) if as_json else command.render_compiled(rows)
        return
    report = command.collect()
    if as_json:
        _print_json(report)
    else:
        command.render(report)


@app.command(epilog="Example: `reca report runs/quickstart`")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: Json = False,
) -> None:
    """One self-contained HTML page: curves, grids before and after, throughput, memory, configuration."""
    from reca.commands.report import write_report

    path = write_report(run)
    if as_json:
        _print_json({"report": str(path)})
    else:
        typer.echo(path)


@data_app.command("check", epilog="Example: `reca data check photos --model bagel/7b-mot`")
def data_check(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder of images or of tars, or one tar.")],
    model: Annotated[
        str, typer.Option("--model", help="family/variant whose image sizes and tokens are estimated.")
    ] = "bagel/7b-mot",
    as_json: Json = False,
) -> None:
    """Decode everything, explain every reject, find exact duplicates, estimate tokens and steps."""
    from reca.commands.data import check, render_check

    result = check(path, model)
    if as_json:
        _print_json(result)
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
        _print_json(result)
    else:
        typer.echo(result["sheet"])


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed_version

        typer.echo(f"reca {installed_version('reca')}")
        raise typer.Exit


def main() -> None:
    """Entry point of the console script: an expected error becomes one or two lines and its exit code."""
    from reca.errors import RecaError

    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments, prog_name="reca")
    except RecaError as error:
        if debug:
            raise
        typer.echo(f"reca: {error}", err=True)
        sys.exit(error.exit_code)
