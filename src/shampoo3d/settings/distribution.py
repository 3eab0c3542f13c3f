"""Settings of how the work is shared between ranks: they change where state is kept and where it is computed."""

from dataclasses import dataclass
from typing import Literal

from shampoo3d.settings.validation import check_choice, check_integer


@dataclass(frozen=True)
class Distribution:
    """Settings of the distribution, validated once. With the defaults, the result is that of one process.

    Args:
        tensor_parallel: "exact": blocks are cut from the logical matrix, however it is sharded; "per_shard": each
            tensor-parallel shard is a matrix of its own, as in the thesis.
        root_copies: the number of replicas that keep each block's roots and momenta. 1: its owner only, least memory.
            More copies reduce traffic: new weights travel only among 1 / root_copies of the replicas.
        update_precision: the dtype in which updates travel home under ZeRO and FSDP: that of the "state", or that of
            the model's own "parameter", such as bfloat16.
        memory_bound: bytes of optimizer state that no rank may exceed; None for no bound.

    Raises:
        TypeError, ValueError: naming the setting, its value and its bound.
    """

    tensor_parallel: Literal["exact", "per_shard"] = "exact"
    root_copies: int = 1
    update_precision: Literal["state", "parameter"] = "state"
    memory_bound: int | None = None

    def __post_init__(self) -> None:
        check_choice("tensor_parallel", self.tensor_parallel, ("exact", "per_shard"))
        check_choice("update_precision", self.update_precision, ("state", "parameter"))
        check_integer("root_copies", self.root_copies, least=1)
        if self.memory_bound is not None:
            check_integer("memory_bound", self.memory_bound, least=0)
