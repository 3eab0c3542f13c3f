"""The settings of Shampoo, validated once, here and nowhere else."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from shampoo3d.settings.computation import Computation, check_method
from shampoo3d.settings.validation import check_bool, check_choice, check_integer, check_number, short
from shampoo3d.settings.variant import Variant


class LayerwiseGrafting(enum.IntEnum):
    """The method whose step length a preconditioned direction borrows (Agarwal et al. 2020, arXiv 2002.11803)."""

    NONE = 0
    SGD = 1
    ADAGRAD = 2
    RMSPROP = 3
    ADAM = 4


_INTERVALS = 10
"""Least number of longer intervals that the steps so far make, where the interval grows."""

_AVERAGED: dict[str, Any] = {
    "beta2": 0.95,
    "diagonal_eps": 1e-8,
    "matrix_eps": 1e-5,
    "block_size": "auto",
    "preconditioning_compute_steps": 10,
    "ignore_embedding_layer": True,
    "ignore_output_layer": True,
    "computation": Computation(root_storage="bfloat16", momentum_storage="bfloat16"),
    "variant": Variant(
        kernels="matrix",
        beta1=0.9,
        graft_beta2=0.95,
        bias_correction=True,
        vectors="diagonal",
        decoupled_weight_decay=True,
    ),
}
"""Settings that the presets ``default`` and ``soap`` share."""


@dataclass(frozen=True)
class ShampooHyperParams:
    """Settings shared by all parameters; the symbols are those of ``docs/update-rule.md``.

    Args:
        beta2: decay of the statistics L; 1.0 sums them (AdaGrad-like), below 1 averages with weight ``1 - beta2``.
        diagonal_eps: added to the square root in the AdaGrad graft; no less than the root of the least normal number.
        matrix_eps: L starts at ``matrix_eps * I`` and each root is taken of ``L + matrix_eps * lambda_max(L) * I``.
        weight_decay: the default of every parameter group; added to the direction as ``weight_decay * W``.
        inverse_exponent_override: p in ``L^(-1/p)``; 0 means twice the number of axes that have a factor.
        start_preconditioning_step: the first step t (counted from 1) that uses the preconditioned direction.
        preconditioning_compute_steps: the roots of a block are computed every so many steps; ``computation.refresh``
            says at which, ``computation.refresh_growth`` by how much they become more.
        statistics_compute_steps: statistics are accumulated at each step t that is a multiple of this.
        block_size: the largest side of a block; 0 keeps every matrix whole. "auto": the shorter side of the matrix,
            at least 128, in equal parts of at most 512; from 2048 on in four, at most 1024.
        best_effort_shape_interpretation: merge adjacent dimensions while their product is at most ``block_size``.
        graft_type: the method whose step length is borrowed, a ``LayerwiseGrafting``, its number or its name.
        nesterov: Nesterov momentum.
        ignore_embedding_layer: leave embeddings without preconditioner (they are grafted only).
        ignore_output_layer: the same for the output layer: what a model names as its output embeddings, and a linear
            layer with as many rows as an embedding has.
        fair_blocks: cut each tensor-parallel matrix along its partitioned axis into as many blocks as the run has
            ranks, so that blocks are the same for every topology with that many ranks.
        nonfinite_gradient: the reaction to a gradient, on any rank, that is NaN, infinite, or so large that sums of its
            squares may be infinite: "skip" the step on all ranks, or "raise", on an accelerator at the next step;
            "ignore" does not check.
        pseudo_inverse: leave out the directions in which L is zero up to rounding, instead of giving them the ridge.
        variant: the variant of Shampoo: choices beyond the thesis.
        computation: settings of how all this is computed.

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
    block_size: int | Literal["auto"] = 0
    best_effort_shape_interpretation: bool = False
    graft_type: LayerwiseGrafting = LayerwiseGrafting.SGD
    nesterov: bool = True
    ignore_embedding_layer: bool = False
    ignore_output_layer: bool = False
    fair_blocks: bool = False
    nonfinite_gradient: Literal["skip", "raise", "ignore"] = "skip"
    pseudo_inverse: bool = False
    variant: Variant = Variant()
    computation: Computation = Computation()

    def __post_init__(self) -> None:
        check_number("beta2", self.beta2, above=0.0, most=1.0)
        check_number("diagonal_eps", self.diagonal_eps, least=0.0)
        check_number("matrix_eps", self.matrix_eps, above=0.0)
        check_number("weight_decay", self.weight_decay, least=0.0)
        check_integer("inverse_exponent_override", self.inverse_exponent_override, least=0)
        if self.block_size != "auto":
            check_integer("block_size", self.block_size, least=0)
        for name in ("start_preconditioning_step", "preconditioning_compute_steps", "statistics_compute_steps"):
            check_integer(name, getattr(self, name), least=1)
        for name in (
            "best_effort_shape_interpretation",
            "nesterov",
            "ignore_embedding_layer",
            "ignore_output_layer",
            "fair_blocks",
            "pseudo_inverse",
        ):
            check_bool(name, getattr(self, name))
        object.__setattr__(self, "graft_type", _graft_type(self.graft_type))
        check_choice("nonfinite_gradient", self.nonfinite_gradient, ("skip", "raise", "ignore"))
        for name, kind in (("variant", Variant), ("computation", Computation)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(getattr(self, name)).__name__}")
        self._check_variant()
        # The number of axes with a factor is known per parameter only: check for a matrix.
        axes = 2 if self.variant.sides == "all" else 1
        check_method(self.computation.root_method, self.exponent(axes), self.pseudo_inverse)

    def _check_variant(self) -> None:
        v = self.variant
        if self.block_size == "auto" and self.best_effort_shape_interpretation:
            raise ValueError("best_effort_shape_interpretation=True merges up to block_size: 'auto' is no number")
        if v.kernels == "matrix" and self.best_effort_shape_interpretation:
            raise ValueError(
                "variant.kernels='matrix' and best_effort_shape_interpretation=True both decide which axes are merged; "
                "take one of them"
            )
        if self.graft_type is LayerwiseGrafting.ADAM and not v.beta1:
            raise ValueError(
                "graft_type='adam' needs variant.beta1 > 0, got 0; for variant.beta1=0 take graft_type='rmsprop'"
            )
        if v.borrow == "decrease":
            self._check_required(
                "variant.borrow='decrease'",
                {
                    "graft_type": (self.graft_type.name, "ADAM"),
                    "start_preconditioning_step": (self.start_preconditioning_step, 1),
                    "variant.direction": (v.direction, "root"),
                    "variant.vectors": (v.vectors, "diagonal"),
                },
            )
        if v.direction == "root":
            if v.statistics == "kl" and self.inverse_exponent_override % 2:
                raise ValueError(
                    "variant.statistics='kl' inverts L by powers of its root, which needs an even exponent; got "
                    f"inverse_exponent_override={self.inverse_exponent_override}"
                )
            return
        if self.beta2 == 1.0:
            raise ValueError("variant.direction='adam' averages squares: it needs beta2 < 1, got 1.0")
        required: dict[str, tuple[object, object]] = {
            "start_preconditioning_step": (self.start_preconditioning_step, 1),  # the first step finds the eigenbasis
            "inverse_exponent_override": (self.inverse_exponent_override, 0),  # and there are no roots
            "pseudo_inverse": (self.pseudo_inverse, False),
            "root_method": (self.computation.root_method, "auto"),
        }
        self._check_required("variant.direction='adam'", required)

    def _check_required(self, choice: str, required: Mapping[str, tuple[object, object]]) -> None:
        for name, (value, wanted) in required.items():
            if value != wanted:
                raise ValueError(f"{name}={value!r} has no meaning with {choice}; take {wanted!r}")

    @classmethod
    def classic(cls, **changes: Any) -> "ShampooHyperParams":
        """Return the thesis's Shampoo: sums, roots at every step, whole matrices, the length of the gradient."""
        return cls(**changes)

    @classmethod
    def default(cls, **changes: Any) -> "ShampooHyperParams":
        """Return the settings that did best for their cost: KL-Shampoo with the decrease of Adam's steps.

        Learning rates, warm-up and weight decay of an AdamW script carry over. Equations: ``docs/variants.md``.

        Args:
            changes: settings that replace the preset's.
        """
        variant = replace(_AVERAGED["variant"], statistics="kl", statistics_sampling=8, borrow="decrease")
        own: dict[str, Any] = {
            "variant": variant,
            "inverse_exponent_override": 2,
            "graft_type": LayerwiseGrafting.ADAM,
            "computation": replace(_AVERAGED["computation"], fresh_steps=20),
        }
        return replace(cls(**_AVERAGED | own), **changes)

    @classmethod
    def soap(cls, **changes: Any) -> "ShampooHyperParams":
        """Return SOAP, Adam in the eigenbases of the factors, as in its paper (Vyas et al. 2024, arXiv 2409.11321).

        Args:
            changes: settings that replace the preset's.
        """
        variant = replace(_AVERAGED["variant"], direction="adam", beta1=0.95)
        return replace(cls(**_AVERAGED | {"graft_type": LayerwiseGrafting.NONE, "variant": variant}), **changes)

    def exponent(self, axes: int) -> int:
        """Return p in ``L^(-1/p)`` for blocks with a factor for this number of axes."""
        return self.inverse_exponent_override or 2 * axes

    @property
    def averaged(self) -> bool:
        """True if an average of the gradient is preconditioned, which leaves no room for other momentum."""
        return self.variant.beta1 > 0.0

    @property
    def heeds_modules(self) -> bool:
        """True if it matters what the module of a parameter says of it: an embedding, a kernel, several matrices."""
        return self.ignore_embedding_layer or self.ignore_output_layer or self.variant.kernels == "matrix"

    @property
    def initial_scale(self) -> float:
        """The scale c of ``L = c I`` before the first gradient: ``matrix_eps``, or 0 where L has gradients only."""
        v = self.variant
        return 0.0 if v.bias_correction or v.direction == "adam" or v.statistics == "kl" else self.matrix_eps

    @property
    def borrows_lengths(self) -> bool:
        """True if whole matrices borrow lengths, whose parts are summed over the ranks."""
        return self.graft_type is not LayerwiseGrafting.NONE and not self.borrows_decrease

    @property
    def borrows_decrease(self) -> bool:
        """True if each block borrows the decrease of Adam's step."""
        return self.variant.borrow == "decrease"

    def diagonal_method(self, factored: bool) -> LayerwiseGrafting:
        """Return the method that defines the direction D, for matrices with or without factors."""
        alone = not factored and self.variant.vectors == "diagonal" and self.graft_type is LayerwiseGrafting.NONE
        return LayerwiseGrafting.ADAM if alone else self.graft_type

    def correction(self, beta: float, t: int, method: LayerwiseGrafting = LayerwiseGrafting.NONE) -> float:
        """Return the divisor of an average of t terms: the weight that it has gathered if bias is corrected, else 1."""
        return 1.0 - beta**t if self.variant.bias_correction or method is LayerwiseGrafting.ADAM else 1.0

    @property
    def fresh_steps(self) -> int:
        """The step up to which roots are computed every other step, those of all blocks with the first gradient.

        For "kl" it is at least the step of the first gradient, whose statistics whiten the next ones.
        """
        kl = self.variant.statistics == "kl" and self.variant.direction == "root"
        return max(self.computation.fresh_steps, self.statistics_compute_steps if kl else 0)

    def refresh_interval(self, t: int) -> int:
        """Return the steps between two refreshes of a root at step t."""
        k = self.preconditioning_compute_steps
        times = min(self.computation.refresh_growth, max(1, t // (_INTERVALS * k)))
        return k << (times.bit_length() - 1)

    @property
    def longest_interval(self) -> int:
        """The steps between two refreshes of a root in the long run."""
        return self.preconditioning_compute_steps * self.computation.refresh_growth

    @property
    def long_run(self) -> int:
        """The step from which the interval is the longest, at least the first interval."""
        k, longest = self.preconditioning_compute_steps, self.longest_interval
        return _INTERVALS * longest if longest > k else k

    @property
    def intervals(self) -> str:
        """The steps between two refreshes of a root, in words."""
        k, longest = self.preconditioning_compute_steps, self.longest_interval
        return f"every {k} steps" + (f", later every {longest}" if longest > k else "")

    @property
    def statistics_weight(self) -> float:
        """The weight of a gradient in the statistics: 1 in a sum, ``1 - beta2`` in an average."""
        return 1.0 if self.beta2 == 1.0 else 1.0 - self.beta2

    def statistics_count(self, t: int) -> int:
        """Return the number of gradients in the statistics after step t."""
        every = self.statistics_compute_steps
        return 1 + (t - 1) // every if self.variant.direction == "adam" else t // every

    @property
    def moves_at_once(self) -> bool:
        """True if the first step moves the weights."""
        return self.weight_updates(1) > 0

    def weight_updates(self, t: int) -> int:
        """Return the number of steps up to t that move the weights; with ``direction="adam"`` the first does not."""
        return t - 1 if self.variant.direction == "adam" else t


def _graft_type(value: object) -> LayerwiseGrafting:
    if isinstance(value, str) and value.upper() in LayerwiseGrafting.__members__:
        return LayerwiseGrafting[value.upper()]
    if isinstance(value, int) and not isinstance(value, bool) and value in set(LayerwiseGrafting):
        return LayerwiseGrafting(value)
    names = ", ".join(f"{graft.name} ({graft.value})" for graft in LayerwiseGrafting)
    raise ValueError(f"graft_type must be one of {names}, got {short(value)}")
