"""Gradients reduced to the owners of their blocks, in the place of an engine's all-reduce."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from shampoo3d.engines import deepspeed
from shampoo3d.runtime.agreement import gradient_norms
from shampoo3d.runtime.bindings import Place
from shampoo3d.runtime.exchange import Exchange


class OwnerReduction:
    """Asked by the engine, which all-reduces only what :meth:`reduce` returns; then asked by the step if all is well.

    A ring all-reduce brings each rank about 2 n (W-1)/W elements of n over W replicas, this n (W-1)/W.
    """

    def __init__(self) -> None:
        self._asked = False
        self._norms: dict[Place, float] = {}

    @property
    def done(self) -> bool:
        """Whether the gradients at hand are averaged at their homes only."""
        return bool(self._norms)

    def reduce(self, params: Iterable[Tensor], exchanges: Sequence[Exchange]) -> list[Tensor]:
        """Average what is bound already, at its homes; return the gradients that the engine has to reduce: the rest.

        A parameter without gradient gets one of zeros, as from the engine.

        Raises:
            ValueError: for an expert, of which only some ranks are replicas.
        """
        self._asked = True
        trainable = [param for param in params if param.requires_grad and param.numel() > 0]
        for param in trainable:
            if deepspeed.expert_replicas(param) is not None:
                raise ValueError("reduce_to_owners does not support parameters of experts; set it to False")
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        for exchange in exchanges:
            exchange.reduce(deepspeed.sequence_parallel_size())
        places = [place for exchange in exchanges for place in exchange.team.places]
        self._norms = gradient_norms(places)
        bound = {place.tensor for place in places}
        return [param.grad.data for param in trainable if param not in bound and param.grad is not None]

    def complaint(self) -> str:
        """Why the gradients at hand can't be used; empty if they can. They are forgotten then."""
        if not self._asked:
            return (
                "reduce_to_owners=True, but no engine asked which gradients to reduce: it needs DeepSpeed at ZeRO "
                "stage 0 with float32"
            )
        before, self._norms = self._norms, {}
        if gradient_norms(list(before)) != before:
            return (
                "the gradients changed after they were reduced to their owners: clipping needs them whole on every "
                'rank; set "gradient_clipping": 0.0, or reduce_to_owners=False'
            )
        return ""
