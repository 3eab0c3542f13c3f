"""The command line: `shampoo3d train`, `plan`, `simulate`, `calibrate`, `checkpoint inspect`, `checkpoint convert`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from datetime import datetime
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

from shampoo3d.cli.options import MODEL, Console, options, require, typer
from shampoo3d.cli.options import show as show_all
from shampoo3d.cli.plan.request import Request
from shampoo3d.cli.simulate.commands import calibrate, simulate
from shampoo3d.cli.train.settings import RUN, RunError, Settings, flag, settings_file

UsageError = cast(type[Exception], typer.BadParameter.__base__)
"""Click's usage error, which recent versions of typer bundle under another name."""

INTERRUPTED = 130
"""The exit code of a process that Ctrl-C ended."""

app = typer.Typer(add_completion=False, help="3D-Shampoo: train with it, see who owns what.")


@app.callback(invoke_without_command=True)
def _base(
    context: typer.Context,
    show: Annotated[
        bool, typer.Option("--version", help="Show the versions of 3D-Shampoo and PyTorch, and exit.")
    ] = False,
) -> None:
    if show:
        typer.echo(f"3d-shampoo {version('3d-shampoo')}, torch {version('torch')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


app.command()(simulate)
app.command()(calibrate)
checkpoint = typer.Typer(help="Look at checkpoints, and make those of DeepSpeed load into any layout.")
app.add_typer(checkpoint, name="checkpoint")

ALL = tuple(setting.name for setting in fields(Settings))
PLANNED = (
    "device",
    "text",
    "layers",
    "width",
    "heads",
    "context",
    "pipe",
    "data",
    "model_parallel",
    "zero_stage",
    "root_copies",
    "block_size",
    "refresh",
)
SHARED = ("device", "pipe", "data", "root_copies", "block_size")
"""Options of the demo's plan and of those of other models."""
RENAMED = {"model_parallel": "tensor", "zero_stage": "zero", "refresh": "preconditioning_compute_steps"}
ASKED = tuple(setting.name for setting in fields(Request) if setting.name not in ("model", *SHARED))


@app.command()
@options(ALL)
def train(
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output, as it was set up.")] = False,
    processes: Annotated[
        int | None, typer.Option(help="A check: must equal --pipe x --data x --model-parallel.")
    ] = None,
    **chosen: Any,
) -> None:
    """Train a small GPT on real text, with AdamW and then with 3D-Shampoo, on a grid of processes.

    Starts all of them on this host; under torchrun (-m shampoo3d.cli train ...) it runs as one of torchrun's instead.
    """
    from shampoo3d.cli.train.text import read_text

    require("deepspeed", "matplotlib")
    settings = _settings({name: value for name, value in chosen.items() if value is not None}, resume)
    settings = replace(settings, device=_device(settings))
    _check_processes(settings, processes)
    read_text(settings.text, settings.context)
    if "RANK" in os.environ:
        _train_as_rank(settings)
    else:
        _train_here(settings)


@app.command()
@options(ASKED, of=Request)
@options(PLANNED)
def plan(
    model: Annotated[str | None, typer.Argument(help=MODEL)] = None,
    picture: Annotated[Path | None, typer.Option(help="The demo: also draw it into this file, as plan.png.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Blocks of 128 to 1024 side by side.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write all numbers into this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write one page to explore it in a browser.")] = None,
    **chosen: Any,
) -> None:
    """Show the plan of a run on MODEL or, without one, of the demo's GPT, without starting any process.

    Tells for the ranks their blocks, the memory that they would keep and allocate (on CPUs unless --device cuda), and
    the traffic that they would receive in a step (roots only when they are refreshed).
    """
    chosen = {name: value for name, value in chosen.items() if value is not None}
    given = {"picture": picture, "compare": compare, "json": json, "html": html}
    names = {*chosen, *(name for name, value in given.items() if value)}
    if model is None:
        _refuse(names & {*ASKED, "compare", "json", "html"}, "needs MODEL, such as gpt2")
        _plan_demo(chosen, picture)
    else:
        _refuse(names & {*RENAMED}, "is the demo's name of {}: take that with MODEL")
        _refuse(names & {*PLANNED, "picture"} - {*SHARED}, "is the demo's: leave it or MODEL out")
        _plan_model(Request(model, **chosen), compare=compare, json=json, html=html)


def _refuse(names: Collection[str], reason: str) -> None:
    if names:
        name = min(names)
        raise RunError(f"{flag(name)} {reason.format(flag(RENAMED.get(name, '')))}")


def _plan_model(request: Request, *, compare: bool, json: Path | None, html: Path | None) -> None:
    from shampoo3d.cli.plan.forecast import Forecast
    from shampoo3d.cli.plan.models import parameters_of
    from shampoo3d.cli.plan.page import page
    from shampoo3d.cli.plan.tables import as_data, shown

    forecast = Forecast.of(request, parameters_of(request.model))
    show_all(shown(forecast, compare=compare))
    if json:
        json.write_text(dumps(as_data(forecast, compare=compare), indent=1) + "\n")
    if html:
        html.write_text(page(forecast, compare=compare), encoding="utf-8")


def _plan_demo(chosen: dict[str, Any], picture: Path | None) -> None:
    from shampoo3d.cli.draw import memory_table, ownership_figure, ownership_table, traffic_table
    from shampoo3d.cli.train.text import read_text

    require("deepspeed", "matplotlib")
    # The batch does not matter here, so it is one that every topology divides.
    settings = Settings(**chosen, batch=chosen.get("data", Settings.data), micro_batches=1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from shampoo3d.cli.train.forecast import foresee

    forecast = foresee(settings, len(read_text(settings.text, settings.context).vocabulary))
    table = ownership_table(forecast.plans)
    table.title = settings.topology
    Console().print(table, memory_table(forecast.memory))
    if any(forecast.received.values()):
        Console().print(traffic_table(forecast.received))
    if picture:
        try:
            ownership_figure(forecast.plans, picture)
        except ValueError as error:
            raise RunError(f"--picture {picture}: {error}") from None


@checkpoint.command("inspect")
def show(
    path: Annotated[Path, typer.Argument(help="A folder that save_checkpoint wrote, or one of DeepSpeed.")],
) -> None:
    """Show what a checkpoint holds, and whether it is complete."""
    from shampoo3d.checkpoint.convert import describe
    from shampoo3d.checkpoint.manifest import CheckpointError, Manifest, flatten_settings, holds_checkpoint
    from shampoo3d.cli.draw import checkpoint_table
    from shampoo3d.settings.hyperparams import ShampooHyperParams

    console = Console(highlight=False)
    try:
        ours = holds_checkpoint(path)
        manifest = Manifest.read(path) if ours else describe(path)
        if damage := manifest.damage(path) if ours else "":
            raise CheckpointError(damage)
    except CheckpointError as error:
        raise RunError(str(error)) from None
    defaults = flatten_settings(ShampooHyperParams())
    settings = (f"{name}={value!r}" for name, value in manifest.hyperparams.items() if value != defaults.get(name))
    size = sum(size for size, _ in manifest.files.values())
    kind = (
        f"3D-Shampoo, format {manifest.format}" if ours else "DeepSpeed; `shampoo3d checkpoint convert` makes it load"
    )
    console.print(f"{path}: {kind}", soft_wrap=True)
    console.print(
        f"step {manifest.step}, {len(manifest.parameters)} parameters, {manifest.skipped_steps} steps skipped"
    )
    if ours:
        console.print(
            f"{len(manifest.files)} files of {size:,} bytes, as they were written by version {manifest.package}"
        )
    console.print("settings:", ", ".join(settings) or "the defaults", soft_wrap=True)
    for number, group in enumerate(manifest.groups):
        options = ", ".join(f"{name}={value!r}" for name, value in group.items())
        console.print(f"group {number}: {options}", soft_wrap=True)
    console.print(checkpoint_table(manifest))


@checkpoint.command()
def convert(
    path: Annotated[
        Path, typer.Argument(help="A checkpoint of DeepSpeed, of a step or the folder above; or a saved state_dict().")
    ],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
) -> None:
    """Convert what DeepSpeed's engine or torch.save wrote into a folder that loads into any layout."""
    from shampoo3d.checkpoint.convert import convert as convert_checkpoint
    from shampoo3d.checkpoint.manifest import CheckpointError

    try:
        manifest = convert_checkpoint(path, target)
    except CheckpointError as error:
        raise RunError(str(error)) from None
    console = Console(highlight=False)
    console.print(f"Written: {target}, step {manifest.step}, {len(manifest.parameters)} parameters", soft_wrap=True)


def _settings(chosen: dict[str, Any], resume: bool) -> Settings:
    """Return the settings that the options ask for, or, on `--resume`, those of the run in the output folder."""
    rank = os.environ.get("RANK")
    output: Path | None = chosen.get("output")
    if output is None:
        if resume or rank is not None:
            raise RunError(f"{'--resume' if resume else 'a launcher'} needs --output, the folder of the run")
        output = Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    if resume:
        return _resumed(output, chosen)
    # Under a launcher the first rank may have begun to write before the others look.
    if rank in (None, "0") and settings_file(output).exists():
        raise RunError(f"--output {output} already holds a run: take another folder, or go on with it by --resume")
    return Settings(**chosen | {"output": output})


def _resumed(output: Path, chosen: dict[str, Any]) -> Settings:
    if not settings_file(output).exists():
        raise RunError(f"--output {output} holds no run to resume")
    saved = Settings.load(output)
    if "text" in chosen:
        chosen["text"] = chosen["text"].resolve()
    for setting in fields(Settings):
        name, panel = setting.name, setting.metadata["panel"]
        if name in chosen and panel != RUN and chosen[name] != getattr(saved, name):
            old, new = getattr(saved, name), chosen[name]
            raise RunError(f"{flag(name)} {new} contradicts the run in {output}, which has {old}: leave it out")
    return replace(saved, **chosen)


def _device(settings: Settings) -> str:
    """Return "cuda" if it is asked for, or if every process of this host can have a GPU; otherwise "cpu"."""
    if settings.device == "cpu":
        return "cpu"
    import torch

    # torchrun sets the number of processes on this host under the first name, the deepspeed launcher under the second.
    local_world = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    needed, gpus = int(local_world or settings.world), torch.cuda.device_count()
    if settings.device == "cuda" and gpus < needed:
        raise RunError(f"--device cuda needs {needed} GPUs on this host for {needed} processes, there are {gpus}")
    return "cuda" if gpus >= needed else "cpu"


def _check_processes(settings: Settings, processes: int | None) -> None:
    launched = os.environ.get("WORLD_SIZE") if "RANK" in os.environ else None
    for asker, count in (("--processes", processes), ("the launcher's WORLD_SIZE", launched)):
        if count is not None and int(count) != settings.world:
            sizes = " x ".join(f"{flag(name)} {getattr(settings, name)}" for name in ("pipe", "data", "model_parallel"))
            raise RunError(f"{asker} is {count}, but {sizes} = {settings.world}: make them equal")


def _train_here(settings: Settings) -> None:
    """Start all processes, show what they report, and print the results."""
    from shampoo3d.cli.train.display import Display
    from shampoo3d.cli.train.launch import launch

    settings.save()
    console = Console(highlight=False)
    display = Display(settings, console)
    for terminating in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(terminating, signal.default_int_handler)
    try:
        with display:
            launch(settings, display.show)
    except KeyboardInterrupt:
        message = f"Stopped at {display.place}, all processes are ended. Kept in {settings.output}; continue with:"
        console.print(message, f"  shampoo3d train --resume --output {settings.output}", sep="\n", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    _print_results(settings, console)


def _train_as_rank(settings: Settings) -> None:
    """Run as the rank that a launcher has started; the first rank shows the progress."""
    from shampoo3d.cli.train.display import Display
    from shampoo3d.cli.train.worker import last_act, quiet, silent, work

    first = os.environ["RANK"] == "0"
    settings.output.mkdir(parents=True, exist_ok=True)
    if first:
        settings.save()
    terminal = os.fdopen(quiet(settings), "w", buffering=1)
    console = Console(file=terminal, highlight=False)
    with last_act(lambda message: print(f"shampoo3d: rank {os.environ['RANK']}: {message}", file=terminal)):
        if first:
            with Display(settings, console) as display:
                work(settings, display.show)
            _print_results(settings, console)
        else:
            work(settings, silent)


def _print_results(settings: Settings, console: Console) -> None:
    from shampoo3d.cli.train.results import conclude

    table, files = conclude(settings)
    console.print(table)
    console.print("Written:", *files, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the console script; an error in the input is reported in one line."""
    try:
        code = app(arguments, prog_name="shampoo3d", standalone_mode=False)
    except (RunError, UsageError) as error:
        message = getattr(error, "format_message", error.__str__)()
        print(f"shampoo3d: {message}", file=sys.stderr)
        code = 2
    except OSError as error:
        print(f"shampoo3d: {error.filename}: {error.strerror}", file=sys.stderr)
        code = 1
    sys.exit(code)
