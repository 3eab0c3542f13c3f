"""Options of commands, made of the settings that they choose; what several commands share."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from shampoo3d.cli.train.settings import RunError, Settings

if TYPE_CHECKING:
    from rich.table import Table

INSTALL = 'pip install "3d-shampoo[cli,deepspeed]"'

try:
    import typer as typer
    from rich.console import Console as Console
except ModuleNotFoundError as missing:
    sys.exit(f"shampoo3d: the command line needs {missing.name}: {INSTALL}")

WIDE = 160
"""Columns of a file that the output goes to."""

MODEL = (
    "A config.json of transformers, a function package.module:function that builds the model, a folder that "
    "save_checkpoint wrote, or one of these: gpt2, gpt2-medium, gpt2-large, gpt2-xl, llama-3-8b, llama-3-70b, "
    "llama-3-405b, qwen3-32b, qwen3-235b-a22b, resnet-50, vit-l. --pipe and --data are 1 unless given, --block-size is "
    "the preset's."
)


def options(names: Collection[str], of: Any = Settings) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Put the named settings before a command's `**chosen`, each with its type, default and help.

    An option that is not given is None, so that `--resume` can tell it from one that is.
    """
    hints = get_type_hints(of)

    def option(setting: Any) -> inspect.Parameter:
        default = "" if setting.default is None else f" Default: {setting.default}."
        info = typer.Option(help=setting.metadata["help"] + default, rich_help_panel=setting.metadata["panel"])
        annotation: Any = Annotated[hints[setting.name] | None, info]
        return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [option(setting) for setting in fields(of) if setting.name in names]
        command.__signature__ = signature.replace(parameters=own + added)  # type: ignore[attr-defined]
        return command

    return decorate


def require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise RunError(f"this command needs {package}: {INSTALL}")


def show(things: Sequence[Table | str]) -> None:
    """Print tables and sentences."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=WIDE)
    for thing in things:
        console.print(thing, soft_wrap=isinstance(thing, str))
