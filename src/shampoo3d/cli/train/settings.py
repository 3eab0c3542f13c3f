"""The settings of a run, checked once."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

OPTIMIZERS = {"adamw": ("adamw",), "shampoo": ("shampoo",), "both": ("adamw", "shampoo")}
TITLES = {"adamw": "AdamW", "shampoo": "3D-Shampoo"}
DEVICES = ("auto", "cpu", "cuda")
ZERO_STAGES = (0, 1, 2, 3)


class RunError(Exception):
    """An error that stops a run, in one line for the person who started it."""


RUN = "Run"
"""The panel of settings that change how a run is carried out, but not what it computes."""


def option(default: Any, help: str, panel: str = "Training") -> Any:
    """Declare a setting, with its help and its panel on the command line."""
    return field(default=default, metadata={"help": help, "panel": panel})


@dataclass(frozen=True)
class Settings:
    """The settings of a run. Equal settings on equal machines give equal runs."""

    output: Path = option(None, "Folder for logs, checkpoints, pictures. Default: runs/DATE-TIME.", RUN)  # noqa: RUF009
    device: str = option("auto", "auto, cpu (gloo) or cuda (NCCL).", RUN)
    threads: int = option(1, "Threads per process on the CPU.", RUN)
    save_every: int = option(100, "Steps between checkpoints.", RUN)
    watch: int = option(0, "Steps between lines that tell what 3D-Shampoo does; 0 for none.", RUN)
    text: Path | None = option(None, "Text to learn. Default: the manual inside Python.", "Model")  # noqa: RUF009
    layers: int = option(4, "Transformer blocks.", "Model")
    width: int = option(128, "Width of the residual stream.", "Model")
    heads: int = option(4, "Attention heads; must divide the width.", "Model")
    context: int = option(128, "Bytes of text that a prediction may look back on.", "Model")
    pipe: int = option(2, "Pipeline stages.", "Topology")
    data: int = option(2, "Data-parallel replicas of each stage.", "Topology")
    model_parallel: int = option(1, "Tensor-parallel shards of each block; must divide the heads.", "Topology")
    zero_stage: int = option(0, "DeepSpeed's ZeRO stage, 0 to 3; a pipeline can have 0 or 1.", "Topology")
    optimizer: str = option("both", "adamw, shampoo or both (one after the other, on the same data).")
    steps: int = option(300, "Optimizer steps.")
    batch: int = option(32, "Sequences per step, over all processes.")
    micro_batches: int = option(4, "Pieces in which the batch of each replica passes through the pipeline.")
    # Validation loss of the default run after 300 steps, by peak rate, with the same schedule:
    # AdamW 1e-3: 2.33, 2e-3: 2.24, 3e-3: 2.15, 4e-3: 2.36, 5e-3: 2.40;
    # 3D-Shampoo 5e-3: 1.20 (with steps as long as Adam's, 6e-3: 1.37, 1e-2: 1.23).
    adamw_lr: float = option(3e-3, "Peak learning rate of AdamW.")
    shampoo_lr: float = option(5e-3, "Peak learning rate of 3D-Shampoo.")
    block_size: int = option(128, "3D-Shampoo: largest block of a matrix along an axis, 0 for whole matrices.")
    refresh: int = option(10, "3D-Shampoo: steps between two computations of the inverse roots.")
    root_copies: int = option(1, "3D-Shampoo: replicas that keep each block's roots: memory against traffic.")
    evaluate_every: int = option(10, "Steps between two validations.")
    seed: int = option(0, "Decides initial weights and batches.")

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise RunError(f"{flag(name)} must be at least 1, not {getattr(self, name)}")
        for name in ("adamw_lr", "shampoo_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RunError(f"{flag(name)} must be a positive number, not {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise RunError(f"{flag(name)} {getattr(self, name)} must not be negative")
        for name, choices in (("optimizer", tuple(OPTIMIZERS)), ("device", DEVICES), ("zero_stage", ZERO_STAGES)):
            if getattr(self, name) not in choices:
                allowed = ", ".join(map(str, choices))
                raise RunError(f"{flag(name)} must be one of {allowed}, not {getattr(self, name)!r}")
        self._check_topology()

    def _check_topology(self) -> None:
        if self.width % self.heads:
            raise RunError(f"--width {self.width} is not a multiple of --heads {self.heads}")
        if self.pipe > self.layers:
            raise RunError(
                f"--pipe {self.pipe} stages cannot share --layers {self.layers}: take at most one stage per layer"
            )
        if self.heads % self.model_parallel:
            raise RunError(f"--heads {self.heads} is not a multiple of --model-parallel {self.model_parallel}")
        if self.root_copies > 1 and self.zero_stage > 0:
            raise RunError(
                f"--root-copies {self.root_copies} needs replicas, and --zero-stage {self.zero_stage} has none: take "
                "--root-copies 1 or --zero-stage 0"
            )
        if self.data % self.root_copies:
            raise RunError(f"--data {self.data} is not a multiple of --root-copies {self.root_copies}")
        if self.zero_stage >= 2 and self.pipe > 1:
            raise RunError(
                f"--zero-stage {self.zero_stage} with --pipe {self.pipe}: DeepSpeed offers no ZeRO 2 or 3 with a "
                "pipeline: take --pipe 1, or at most --zero-stage 1"
            )
        if self.batch % (self.data * self.micro_batches):
            raise RunError(
                f"--batch {self.batch} is not a multiple of --data {self.data} x --micro-batches {self.micro_batches}"
                f" = {self.data * self.micro_batches}"
            )

    @property
    def world(self) -> int:
        return self.pipe * self.data * self.model_parallel

    @property
    def topology(self) -> str:
        """The topology in words."""
        model = f" x model {self.model_parallel}" if self.model_parallel > 1 else ""
        zero = f", ZeRO {self.zero_stage}" if self.zero_stage else ""
        return f"pipe {self.pipe} x data {self.data}{model}{zero}"

    @property
    def micro_batch(self) -> int:
        """The number of sequences that one process takes at a time."""
        return self.batch // (self.data * self.micro_batches)

    @property
    def optimizers(self) -> tuple[str, ...]:
        return OPTIMIZERS[self.optimizer]

    def save(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        values = asdict(self) | {"output": None, "text": self.text and str(self.text.resolve())}
        settings_file(self.output).write_text(json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, output: Path) -> Settings:
        path = settings_file(output)
        try:
            values = json.loads(path.read_text())
            return cls(**values | {"output": output, "text": values["text"] and Path(values["text"])})
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f"{path} does not hold the settings of a run: {error}") from None


_NOT_NEGATIVE = ("block_size", "seed", "watch")
_POSITIVE = [f.name for f in fields(Settings) if f.type == "int" and f.name not in (*_NOT_NEGATIVE, "zero_stage")]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def settings_file(output: Path) -> Path:
    return output / "settings.json"


def plan_file(output: Path) -> Path:
    return output / "plan.json"


def log_file(output: Path, optimizer: str) -> Path:
    """Return the path of the training log of one optimizer."""
    return output / optimizer / "log.jsonl"


def rank_log(output: Path, rank: int) -> Path:
    """Return the path of the file with what the libraries of one rank print."""
    return output / f"rank-{rank}.log"
