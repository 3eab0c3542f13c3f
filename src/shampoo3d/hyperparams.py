"""The settings of Shampoo, validated once, here and nowhere else."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shampoo3d.checks import check_bool, check_choice, check_integer, check_number
from shampoo3d.computation import Computation, Precision, check_method


class LayerwiseGrafting(enum.IntEnum):
    """Whose step length a preconditioned direction borrows (Agarwal et al. 2020, arXiv 2002.11803)."""

    NONE = 0
    SGD = 1
    ADAGRAD = 2


@dataclass(frozen=True)
class ShampooHyperParams:
    """Settings shared by all parameters; the symbols are those of ``docs/update-rule.md``.

    Args:
        beta2: decay of the statistics L; 1.0 sums them (AdaGrad-like), below 1 averages with weight ``1 - beta2``.
        diagonal_eps: added to the square root in the AdaGrad graft.
        matrix_eps: L starts at ``matrix_eps * I`` and each root is taken of ``L + matrix_eps * lambda_max(L) * I``.
        weight_decay: the default of every parameter group; added to the direction as ``weight_decay * W``.
        inverse_exponent_override: p in ``L^(-1/p)``; 0 means ``2 * rank`` of the (merged) parameter.
        start_preconditioning_step: the first step t (counted from 1) that uses the preconditioned direction.
        preconditioning_compute_steps: the roots of a block are computed every so many steps; ``computation.refresh``
            says at which.
        statistics_compute_steps: statistics are accumulated at each step t that it divides.
        block_size: the largest side of a block; 0 keeps every matrix whole.
        best_effort_shape_interpretation: merge adjacent dimensions while their product is at most ``block_size``.
        graft_type: the method whose step length is borrowed, a ``LayerwiseGrafting``, its number or its name.
        nesterov: Nesterov momentum.
        ignore_embedding_layer: leave embeddings without preconditioner (they are grafted only).
        fair_blocks: cut each tensor-parallel matrix along its partitioned axis into as many blocks as the run has
            ranks, so that blocks are the same for every topology of that many ranks.
        nonfinite_gradient: what a gradient on any rank that is NaN or infinite, or whose squares are, does: "skip" the
            step on all ranks, or "raise"; "ignore" does not look, which spares the host to wait for the GPU.
        pseudo_inverse: leave out the directions in which L is zero up to rounding, instead of giving them the ridge.
        computation: how all this is computed.

    Raises:
        TypeError, ValueError: naming the setting, its value and its bound.
    """

    beta2: float = 1.0
    diagonal_eps: float = 1e-6
    matrix_eps: float = 1e-12
    weight_decay: float = 0.0
    inverse_exponent_override: int = 0
    start_preconditioning_step: int = 1
    preconditioning_compute_steps: int = 1
    statistics_compute_steps: int = 1
    block_size: int = 0
    best_effort_shape_interpretation: bool = False
    graft_type: LayerwiseGrafting = LayerwiseGrafting.SGD
    nesterov: bool = True
    ignore_embedding_layer: bool = False
    fair_blocks: bool = False
    nonfinite_gradient: Literal["skip", "raise", "ignore"] = "skip"
    pseudo_inverse: bool = False
    computation: Computation = Computation()

    def __post_init__(self) -> None:
        check_number("beta2", self.beta2, above=0.0, most=1.0)
        check_number("diagonal_eps", self.diagonal_eps, least=0.0)
        check_number("matrix_eps", self.matrix_eps, above=0.0)
        check_number("weight_decay", self.weight_decay, least=0.0)
        for name in ("inverse_exponent_override", "block_size"):
            check_integer(name, getattr(self, name), least=0)
        for name in ("start_preconditioning_step", "preconditioning_compute_steps", "statistics_compute_steps"):
            check_integer(name, getattr(self, name), least=1)
        for name in (
            "best_effort_shape_interpretation",
            "nesterov",
            "ignore_embedding_layer",
            "fair_blocks",
            "pseudo_inverse",
        ):
            check_bool(name, getattr(self, name))
        object.__setattr__(self, "graft_type", _graft_type(self.graft_type))
        check_choice("nonfinite_gradient", self.nonfinite_gradient, ("skip", "raise", "ignore"))
        if not isinstance(self.computation, Computation):
            raise TypeError(f"computation must be a Computation, got {type(self.computation).__name__}")
        # The rank is known with a parameter only: here that of a matrix.
        check_method(self.computation.root_method, self.exponent(2), self.pseudo_inverse)

    def exponent(self, rank: int) -> int:
        """p in ``L^(-1/p)`` for blocks with so many preconditioned axes."""
        return self.inverse_exponent_override or 2 * rank


def momenta_names(hp: ShampooHyperParams) -> tuple[str, ...]:
    """The state that is kept for each element: M and, where the settings need them, N and the sum of G^2."""
    names = ["momentum"]
    names += ["graft_momentum"] * (hp.start_preconditioning_step > 1)
    names += ["graft_accumulator"] * (hp.graft_type is LayerwiseGrafting.ADAGRAD)
    return tuple(names)


def storage_of(name: str, hp: ShampooHyperParams) -> Precision:
    """In which dtype a part of the state is kept, by its name in a checkpoint."""
    if name.startswith("P"):
        return hp.computation.root_storage
    # Sums of squares grow by less than bfloat16 resolves, and would stop; statistics lose their small eigenvalues.
    return hp.computation.momentum_storage if name in ("momentum", "graft_momentum") else "state"


def _graft_type(value: object) -> LayerwiseGrafting:
    if isinstance(value, str) and value.upper() in LayerwiseGrafting.__members__:
        return LayerwiseGrafting[value.upper()]
    if isinstance(value, int) and not isinstance(value, bool) and value in set(LayerwiseGrafting):
        return LayerwiseGrafting(value)
    names = ", ".join(f"{graft.name} ({graft.value})" for graft in LayerwiseGrafting)
    raise ValueError(f"graft_type must be one of {names}, got {value!r}")


# Settings of other optimizers that would be silently ignored, were they let into a parameter group.
_FOREIGN_OPTIONS = {
    *("alpha", "amsgrad", "betas", "capturable", "centered", "dampening", "decoupled_weight_decay", "differentiable"),
    *("eps", "etas", "foreach", "fused", "lambd", "lr_decay", "ns_steps", "rho", "t0"),
    *(ShampooHyperParams.__dataclass_fields__.keys() - {"weight_decay"}),
}


def check_group(group: Mapping[str, Any]) -> None:
    """Raise unless the settings of a parameter group are valid and its own (foreign options are refused by name)."""
    foreign = sorted(_FOREIGN_OPTIONS.intersection(group))
    if foreign:
        raise ValueError(
            f"Shampoo has no parameter-group option {', '.join(map(repr, foreign))}; a group may set lr, momentum, "
            "weight_decay, precondition and maximize, everything else is set in ShampooHyperParams for all groups"
        )
    check_number("lr", group["lr"], least=0.0)
    check_number("momentum", group["momentum"], least=0.0)
    check_number("weight_decay", group["weight_decay"], least=0.0)
    check_bool("precondition", group["precondition"])
    check_bool("maximize", group["maximize"])
