"""The `reca` console script: thin. Each command parses its arguments, calls `reca.commands`, prints and
exits.

Only typer is imported here, so that `--help` answers at once; a command imports torch when it runs. An error
of the user's is one or two lines and an exit code of `reca.errors`; `--debug`, anywhere, shows the traceback.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from reca.commands.groups import bench_app, data_app
from reca.commands.options import (
    Device,
    ImageGuidance,
    Json,
    Model,
    Out,
    Seed,
    Source,
    Steps,
    TextGuidance,
    print_json,
)

app = typer.Typer(
    name="reca",
    help="Reconstruction Alignment (RecA) post-training for unified multimodal models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Try it now: `reca train quickstart`. Add `--debug` to any command to see a traceback.",
)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")


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
        print_json(summary)


@app.command(epilog="Example: `reca plan bagel-7b --gpu h200`, or `reca plan showo-clip-512 --gpu l40s`")
def plan(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a YAML file with `extends: NAME`.")
    ],
    gpu: Annotated[
        str,
        typer.Option("--gpu", help="rtx-3090 rtx-4090 rtx-5090 a6000 l40s a100-40 a100-80 h100 h200 b200."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides.")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="How many; one is supported so far.")] = 1,
    launches: Annotated[
        bool,
        typer.Option("--launches", help="Kernels and bytes by operator, in plain torch and with operators."),
    ] = False,
    as_json: Json = False,
) -> None:
    """What a recipe needs of a GPU: memory part by part, FLOPs, PREDICTED time. Needs no GPU, no weights."""
    from reca.commands import plan as command

    result = command.plan_recipe(recipe, overrides or [], gpu=gpu, gpus=gpus, launches=launches)
    if as_json:
        print_json(command.record(result))
    else:
        command.render(result)


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
        print_json(result)
    else:
        for path in [*result["images"], result["sheet"]]:
            typer.echo(path)


@app.command(epilog="Example: `reca export runs/bagel-7b --out BAGEL-7B-RecA --verify`")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist yet.")],
    to: Annotated[str, typer.Option("--to", help="Format; `official` is that of the release.")] = "official",
    ema: Annotated[
        bool, typer.Option("--ema", help="The average of the weights, if the run kept one.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Reload in a fresh process; compare every tensor and a forward pass."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a run's newest weights as the files that others load, whole or not at all."""
    from reca.commands.export import export_run, render_export

    result = export_run(run, out, to=to, average=ema, verify=verify)
    if as_json:
        print_json(result)
    else:
        typer.echo(render_export(result))


@app.command(epilog="Example: `reca verify tests/data/parity/bagel/*`")
def verify(
    packs: Annotated[
        list[Path], typer.Argument(metavar="PACK...", help="Pack folders, or folders that hold packs.")
    ],
    kernels: Annotated[
        Literal["auto", "fused", "reference"],
        typer.Option(help="Operators that reproduce them; fused needs TRITON_INTERPRET=1."),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Run parity packs: loss, named activations and every gradient against the official code's tensors."""
    from reca.commands import verify as command

    results = command.verify(packs, kernels)
    if as_json:
        print_json(command.records(results))
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
        print_json(rows) if as_json else command.render_compiled(rows)
        return
    report = command.collect()
    if as_json:
        print_json(report)
    else:
        command.render(report)


@app.command(epilog="Example: `reca evaluate runs/world --suite world`, or `reca evaluate package:world`")
def evaluate(
    source: Source,
    suite: Annotated[str, typer.Option("--suite", help="What to score with; `world` is exact.")] = "world",
    model: Model = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Seed of prompts and pictures; default the run's.")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option("--prompts", min=2, max=500, help="Prompts of each category.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Scores with standard errors, of a run or of weights."""
    from reca.commands import evaluate as command

    result = command.evaluate(source, suite, model=model, seed=seed, prompts=prompts, device=device)
    if as_json:
        print_json(result)
    else:
        typer.echo(command.render(result))


@app.command(epilog="Example: `reca report runs/quickstart`")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: Json = False,
) -> None:
    """One self-contained HTML page: curves, grids before and after, throughput, memory, configuration."""
    from reca.commands.report import write_report

    path = write_report(run)
    if as_json:
        print_json({"report": str(path)})
    else:
        typer.echo(path)


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
