"""The commands `shampoo3d simulate` and `shampoo3d calibrate`."""

from __future__ import annotations

from dataclasses import fields
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from shampoo3d.cli.options import MODEL, options, require, show, typer
from shampoo3d.cli.plan.request import Request
from shampoo3d.cli.train.settings import RunError

HARDWARE = "a100, h100, h200, b200, mi300x, or a file that `shampoo3d calibrate` wrote."
SIMULATED = tuple(setting.name for setting in fields(Request) if setting.name not in ("model", "device", "fits"))
"""Options of `shampoo3d plan` that a simulation has, too; its device is the hardware's."""


@options(SIMULATED, of=Request)
def simulate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    hardware: Annotated[str, typer.Option(help=HARDWARE)] = "h100",
    micro_batches: Annotated[int, typer.Option(help="Pieces in which a batch passes through a pipeline.")] = 8,
    scaling: Annotated[bool, typer.Option("--scaling", help="Also 1 to 16,384 data ranks.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also draw the ranks in time: a file .png or .svg.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write all numbers into this file.")] = None,
    **chosen: Any,
) -> None:
    """Foresee the seconds of a step on described hardware, without starting any process.

    The steps of a refresh schedule by phase, what ranks wait for, and the share of a training step. Presets are data
    sheets with assumed efficiencies; `shampoo3d calibrate` describes the machine it runs on.
    """
    from shampoo3d.cli.plan.forecast import Forecast
    from shampoo3d.cli.plan.models import parameters_of

    from .hardware import hardware_of
    from .simulation import Simulation
    from .simulation import scaling as scaled
    from .tables import as_data, shown

    if micro_batches < 1:
        raise RunError(f"--micro-batches must be at least 1, not {micro_batches}")
    if picture and picture.suffix not in (".png", ".svg"):
        raise RunError(f"--picture {picture} must end in .png or .svg")
    described = hardware_of(hardware)
    asked = {name: value for name, value in chosen.items() if value is not None}
    request = Request(model, **asked, device="cuda" if described.queue else "cpu")
    parameters = parameters_of(model)
    simulation = Simulation.of(Forecast.of(request, parameters), described, micro_batches)
    curve = [*scaled(request, parameters, described, micro_batches)] if scaling else []
    show(shown(simulation, curve))
    if json:
        json.write_text(dumps(as_data(simulation, curve), indent=1) + "\n")
    if picture:
        require("matplotlib")
        from .pictures import draw

        draw(simulation, curve, picture)


def calibrate(
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("machine.json"),
    ranks: Annotated[int, typer.Option(help="Processes that measure at once, and the links between them.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, a thread of it for each process, or cuda.")] = "cpu",
    seconds: Annotated[float, typer.Option(help="Of each measurement, of which there are about 50.")] = 0.3,
    cpu: Annotated[bool, typer.Option("--cpu-seconds", help="Not those in which others have the CPU.")] = False,
) -> None:
    """Measure this machine for `shampoo3d simulate --hardware`: products, memory, decompositions, overhead, links.

    Takes about half a minute, more with more ranks. The machine should have nothing else to do.
    """
    from .calibrate import calibrate as measured
    from .tables import hardware_table

    if ranks < 1:
        raise RunError(f"--ranks must be at least 1, not {ranks}")
    if not 0 < seconds < 60:
        raise RunError(f"--seconds must be above 0 and below 60, not {seconds:g}")
    _check_device(device, ranks)
    hardware = measured(device, ranks, seconds, cpu=cpu)
    out.write_text(hardware.to_json())
    show([hardware_table(hardware), f"Written: {out}; shampoo3d simulate MODEL --hardware {out}"])


def _check_device(device: str, ranks: int) -> None:
    import torch

    if device not in ("cpu", "cuda"):
        raise RunError(f"--device must be cpu or cuda, not {device!r}")
    if device == "cuda" and torch.cuda.device_count() < ranks:
        raise RunError(f"--device cuda with --ranks {ranks} needs {ranks} GPUs, there are {torch.cuda.device_count()}")
