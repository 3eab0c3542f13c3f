"""Protection of a step from what its caller has set in PyTorch for other code."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Compute without autocast, gradients and inference mode, in whose tensors later steps could not write.

    Default dtypes and devices need nothing here: every tensor that the package makes is given both.

    Raises:
        RuntimeError: inside a transform of ``torch.func``, whose tensors do not outlive it.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError("the optimizer was called inside a transform such as torch.func.grad; call it outside")
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    kinds = {"cpu", accelerator.type if accelerator else "cuda"}
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
