"""The question that `shampoo3d plan MODEL` answers, checked once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shampoo3d.cli.train.settings import RunError, flag, option
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.names import hyperparams_of

ANYBODYS = "With MODEL"
UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Request:
    """A model, a layout and settings. Ranks are numbered by stage, then data rank, then tensor-parallel rank."""

    model: str
    pipe: int = option(1, "Pipeline stages.")
    data: int = option(1, "Data-parallel ranks.")
    root_copies: int = option(1, "Replicas that keep each block's roots.")
    block_size: int | None = option(None, "The largest side of a block.")
    device: str = option("cpu", "cpu or cuda.")
    tensor: int = option(1, "Tensor-parallel shards of each layer, as Megatron cuts them.", ANYBODYS)
    expert: int = option(
        1, "Expert-parallel ranks among the data ranks, which share the experts; must divide --data.", ANYBODYS
    )
    zero: int = option(0, "DeepSpeed's ZeRO stage, 0 to 3.", ANYBODYS)
    fsdp: bool = option(False, "FSDP2: each parameter sharded over the data ranks.", ANYBODYS)
    replicas: int = option(1, "HSDP: replicas of each shard of --fsdp; must divide --data.", ANYBODYS)
    preset: str = option("recommended", "recommended, soap or classic.", ANYBODYS)
    preconditioning_compute_steps: int | None = option(
        None, "Steps between two computations of a root. Default: the preset's.", ANYBODYS
    )
    asynchronous: bool = option(False, "Roots beside the next forward and backward passes.", ANYBODYS)
    tokens: int = option(1_000_000, "Tokens of a training step, over all ranks.", ANYBODYS)
    fits: str | None = option(None, "Bytes for the state on a rank, such as 80GB.", ANYBODYS)

    def __post_init__(self) -> None:
        for name in ("pipe", "data", "tensor", "expert", "replicas", "root_copies", "tokens"):
            if getattr(self, name) < 1:
                raise RunError(f"{flag(name)} must be at least 1, not {getattr(self, name)}")
        if self.zero not in (0, 1, 2, 3):
            raise RunError(f"--zero must be one of 0, 1, 2, 3, not {self.zero}")
        if self.zero and self.fsdp:
            raise RunError(f"--zero {self.zero} and --fsdp both shard the parameters: take one of them")
        if self.zero > 1 and self.pipe > 1:
            raise RunError(
                f"--zero {self.zero} with --pipe {self.pipe}: DeepSpeed offers no ZeRO 2 or 3 with a pipeline: take "
                "--pipe 1, or at most --zero 1"
            )
        if self.replicas > 1 and not self.fsdp:
            raise RunError(f"--replicas {self.replicas} are replicas of the shards of FSDP: add --fsdp")
        if self.data % self.replicas:
            raise RunError(f"--data {self.data} is not a multiple of --replicas {self.replicas}")
        self._check_experts()
        if self.device not in ("auto", "cpu", "cuda"):
            raise RunError(f"--device must be one of auto, cpu, cuda, not {self.device!r}")
        self._check_copies()
        assert self.limit is None or self.limit > 0
        assert self.hp

    def _check_experts(self) -> None:
        if self.data % (self.expert * self.replicas):
            ranks = f"--data {self.data}" if self.replicas == 1 else f"the {self.shards} data ranks of a replica"
            raise RunError(
                f"--expert {self.expert} does not divide {ranks}: expert-parallel ranks are data ranks; take a "
                f"multiple of {self.expert * self.replicas} for --data"
            )
        if self.expert > 1 and self.zero == 3:
            raise RunError(
                f"--zero 3 with --expert {self.expert}: DeepSpeed's MoE layers have no ZeRO 3: take at most --zero 2, "
                "or --fsdp"
            )

    def _check_copies(self) -> None:
        if self.root_copies > 1 and self.sharded:
            raise RunError(
                f"--root-copies {self.root_copies} needs replicas, and {self.storage} has none: take --root-copies 1"
            )
        replicas = self.replicas if self.fsdp else self.data // self.expert
        if replicas % self.root_copies:
            of = " of an expert" if self.expert > 1 else ""
            raise RunError(f"--root-copies {self.root_copies} does not divide the {replicas} replicas{of}")

    @property
    def world(self) -> int:
        return self.pipe * self.data * self.tensor

    @property
    def unit(self) -> int:
        """The least data ranks of such a layout, whose multiples are possible, too."""
        return self.expert * (self.replicas if self.fsdp else self.root_copies)

    @property
    def shards(self) -> int:
        """The number of parts in which FSDP stores a parameter."""
        return self.data // self.replicas if self.fsdp else 1

    @property
    def sharded(self) -> bool:
        """True if each element is stored on one data rank."""
        return self.zero > 0 or (self.fsdp and self.replicas == 1)

    @property
    def storage(self) -> str:
        """The storage of the parameters on data ranks, in words."""
        if self.fsdp:
            return f"HSDP, {self.replicas} replicas of {self.shards} shards" if self.replicas > 1 else "FSDP2"
        return f"ZeRO {self.zero}" if self.zero else "replicas"

    @property
    def layout(self) -> str:
        """The layout in words."""
        experts = f" (expert {self.expert})" if self.expert > 1 else ""
        return f"pipe {self.pipe} x data {self.data}{experts} x tensor {self.tensor}, {self.storage}"

    @property
    def hp(self) -> ShampooHyperParams:
        """The settings of the optimizer."""
        names = ("block_size", "preconditioning_compute_steps", "asynchronous")
        changes = {name: value for name in names if (value := getattr(self, name)) not in (None, False)}
        try:
            return hyperparams_of({"preset": self.preset, **changes})
        except (TypeError, ValueError) as error:
            raise RunError(f"--preset {self.preset}: {error}") from None

    @property
    def limit(self) -> int | None:
        """The bytes of --fits."""
        return None if self.fits is None else size_of(self.fits)


def size_of(text: str) -> int:
    """Read a number of bytes such as 80GB or 40GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = float(found[1]) * (1024 if found[3] else 1000) ** UNITS[found[2].upper()] if found else 0
    if not found or size < 1:
        raise RunError(f"--fits {text} is no number of bytes: write it as 80GB or 40GiB")
    return int(size)
