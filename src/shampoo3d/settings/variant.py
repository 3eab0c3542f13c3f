"""The variant of Shampoo: choices beyond the thesis that the field found to matter."""

from dataclasses import dataclass
from typing import Literal

from shampoo3d.settings.validation import check_bool, check_choice, check_integer, check_number

Direction = Literal["root", "adam"]
Statistics = Literal["gradient", "kl"]
Sides = Literal["all", "first", "last", "shortest"]
LongAxes = Literal["none", "diagonal"]
Borrowed = Literal["length", "decrease"]
Kernels = Literal["axes", "matrix"]
LONGEST_KERNEL = 16
"""The longest axis that counts as one of a convolution's kernel; longer ones are something else: experts, positions."""


@dataclass(frozen=True)
class Variant:
    """Choices of the variant, validated once; the defaults are the thesis's Shampoo. Equations: ``docs/variants.md``.

    Args:
        direction: "root": ``G x_1 L_1^(-1/p) x_2 ...``; "adam": Adam in the eigenbasis of the factors (SOAP, Vyas et
            al. 2024, arXiv 2409.11321).
        statistics: "gradient": ``G_(i) G_(i)^T``; "kl": G is preconditioned by the other factors first, which
            minimizes a Kullback-Leibler divergence (Lin et al. 2025, arXiv 2509.03378).
        statistics_sampling: the statistics of a step take account of every so-many-th column of ``G_(i)``, in turns; of
            the first gradient they take all. 1 for all columns always.
        sides: the axes that have a factor: "all", the "first" or "last" only, or the "shortest" of each matrix; with
            one side the exponent is -1/2 (one-sided Shampoo, Xie et al. 2025, arXiv 2503.10537).
        largest_dimension: axes of blocks that are longer than this have no factor (Vyas et al. 2024), or a diagonal
            one; 0 for no bound.
        long_axes: the factor of such axes: "none", or a "diagonal" one, a vector of sums of squares (Gupta et al. 2018,
            arXiv 1802.09568, on a diagonal variant; Anil et al. 2020, arXiv 2002.09018, on large dimensions). It counts
            in the exponent. Not for "adam": the eigenbasis of a diagonal matrix is I.
        kernels: the shape of a convolution's weight (out, in, height, width): each of its "axes" has a factor, or it is
            the "matrix" (out, in height width) (Grosse and Martens 2016, arXiv 1602.01407). With "matrix" what is not
            known to be a convolution's, and has an axis from the third on that is longer than 16, is a stack of
            matrices, each with its own factors; and a matrix of one row or column is a vector.
        beta1: decay of an average of the gradient, which is preconditioned and grafted in place of the gradient; there
            is no other momentum then. 0 for none.
        look_ahead: precondition ``beta1 E + (1 - beta1) G``, the average E as it would be after the same gradient once
            more, in its place (Nesterov's momentum, in the form of Dozat 2016).
        borrow: a preconditioned direction S borrows the "length" of the grafted one, D, for each whole matrix, or its
            "decrease": each block is scaled so that the loss falls by ``<E, D>`` to first order, with squares that are
            kept by axis instead of by element (Shazeer and Stern 2018, arXiv 1804.04235). Of Adam's D only.
        graft_beta2: decay of the average of ``G^2`` for the RMSPROP and ADAM grafts and the diagonal direction.
        bias_correction: divide averages by the weight that they have gathered, ``1 - beta^t`` (Kingma and Ba 2014,
            arXiv 1412.6980).
        vectors: the direction of parameters without factors: "scaled": G with the length of the graft; "diagonal": that
            of the graft itself, or of Adam where nothing is grafted.
        decoupled_weight_decay: ``W <- (1 - lr weight_decay) W`` beside the step, instead of decay in the direction
            (Loshchilov and Hutter 2017, arXiv 1711.05101).
        refresh_tolerance: for "adam": an eigenbasis Q that is due for a refresh stays as long as the off-diagonal part
            of ``Q^T L Q`` is at most this fraction of the whole, in Frobenius norms (Eschenhagen et al. 2025, arXiv
            2506.03595); 0: never.

    Raises:
        TypeError, ValueError: naming the setting, its value and its bound.
    """

    direction: Direction = "root"
    statistics: Statistics = "gradient"
    statistics_sampling: int = 1
    sides: Sides = "all"
    largest_dimension: int = 0
    long_axes: LongAxes = "none"
    kernels: Kernels = "axes"
    beta1: float = 0.0
    look_ahead: bool = False
    borrow: Borrowed = "length"
    graft_beta2: float = 0.999
    bias_correction: bool = False
    vectors: Literal["scaled", "diagonal"] = "scaled"
    decoupled_weight_decay: bool = False
    refresh_tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_choice("direction", self.direction, ("root", "adam"))
        check_choice("statistics", self.statistics, ("gradient", "kl"))
        check_choice("sides", self.sides, ("all", "first", "last", "shortest"))
        check_choice("long_axes", self.long_axes, ("none", "diagonal"))
        check_choice("kernels", self.kernels, ("axes", "matrix"))
        check_choice("vectors", self.vectors, ("scaled", "diagonal"))
        check_choice("borrow", self.borrow, ("length", "decrease"))
        check_bool("look_ahead", self.look_ahead)
        if self.look_ahead and not self.beta1:
            raise ValueError("look_ahead=True looks ahead of an average: it needs beta1 > 0, got 0")
        check_integer("statistics_sampling", self.statistics_sampling, least=1)
        check_integer("largest_dimension", self.largest_dimension, least=0)
        check_number("beta1", self.beta1, least=0.0, below=1.0)
        check_number("graft_beta2", self.graft_beta2, least=0.0, below=1.0)
        check_number("refresh_tolerance", self.refresh_tolerance, least=0.0, below=1.0)
        check_bool("bias_correction", self.bias_correction)
        check_bool("decoupled_weight_decay", self.decoupled_weight_decay)
        if self.long_axes == "diagonal" and not self.largest_dimension:
            raise ValueError(
                "long_axes='diagonal' has no meaning with largest_dimension=0, for which no axis is long; take "
                "largest_dimension > 0"
            )
        if self.refresh_tolerance and self.direction == "root":
            raise ValueError(
                f"refresh_tolerance={self.refresh_tolerance} is about eigenbases: it has no meaning with "
                "direction='root'; take refresh_tolerance=0 or direction='adam'"
            )
        if self.long_axes == "diagonal" and self.direction == "adam":
            raise ValueError(
                "long_axes='diagonal' has no meaning with direction='adam': the eigenbasis of a diagonal factor is I, "
                "as if there were none; take long_axes='none'"
            )
