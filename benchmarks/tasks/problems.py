"""The tasks: what is to be learnt, from which data, and for how long. Nothing here knows an optimizer."""

import io
import lzma
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from tasks.models import GPT, Autoencoder, ConvNet, VisionTransformer, seeded
from torch import Tensor, nn

CONTEXT = 64
CHARACTERS = 1_000_000  # of the text that comes with Python


class Batch(NamedTuple):
    inputs: Tensor
    targets: Tensor


Draw = Callable[[torch.Generator], Batch]


@dataclass(frozen=True)
class Task:
    """A model, its data and its loss.

    Args:
        data: what the data are, in words.
        steps: the budget of every optimizer.
        make: a model with the weights that belong to a seed.
        draw: a random batch of the training data.
        validation: the batches whose mean loss counts; they are the same for every run.
        loss: of the model's outputs and the batch's targets.
    """

    name: str
    data: str
    steps: int
    make: Callable[[int], nn.Module]
    draw: Draw
    validation: list[Batch]
    loss: Callable[[Tensor, Tensor], Tensor]

    def batches(self, seed: int) -> Iterator[Batch]:
        """Without end, and the same for every optimizer."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.draw(generator)

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss(model(batch.inputs), batch.targets)

    def validation_loss(self, model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            losses = [self.training_loss(model, batch) for batch in self.validation]
        model.train()
        return float(torch.stack(losses).mean())

    @property
    def facts(self) -> dict[str, str | int]:
        """Return the settings that a result depends on besides the optimizer."""
        parameters = sum(param.numel() for param in self.make(0).parameters())
        batch = len(self.draw(torch.Generator()).inputs)
        return {
            "task": self.name,
            "data": self.data,
            "steps": self.steps,
            "batch": batch,
            "parameters": parameters,
        }

    def shortened(self, steps: int) -> "Task":
        """The same with another budget, and so with another schedule."""
        return replace(self, steps=steps)


# ---- text ------------------------------------------------------------------------------------------------------------


def read_text(path: Path | None) -> tuple[str, str]:
    """A text and what it is: the file, or else the manual and the sources that come with Python."""
    if path is not None:
        text = path.read_text(encoding="utf-8", errors="replace")
        return text, f"{path.name}, {len(text)} characters"
    from pydoc_data.topics import topics

    sources = {path.name: path.read_text("utf-8", "replace") for path in Path(os.__file__).parent.glob("*.py")}
    pieces = topics | sources
    # By the ends of their names, which mixes the subjects: the last tenth, which validates, is to be like the rest.
    text = "\n".join(pieces[name] for name in sorted(pieces, key=lambda name: name.removesuffix(".py")[::-1]))
    text = text.encode("ascii", "replace").decode()[:CHARACTERS]
    return text, f"manual and sources of Python, {len(text)} characters"


def gpt(
    path: Path | None,
    name: str = "gpt",
    steps: int = 800,
    batch: int = 32,
    width: int = 96,
    layers: int = 4,
    heads: int = 4,
) -> Task:
    """A language model of characters; the last tenth of the text validates."""
    text, data = read_text(path)
    symbols = sorted(set(text))
    number = {symbol: index for index, symbol in enumerate(symbols)}
    tokens = torch.tensor([number[symbol] for symbol in text])
    cut = len(tokens) * 9 // 10

    def draw(part: Tensor, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(part) - CONTEXT, (batch,), generator=generator)
        windows = part[starts[:, None] + torch.arange(CONTEXT + 1)]
        return Batch(windows[:, :-1], windows[:, 1:])

    held_out = torch.Generator().manual_seed(0)
    return Task(
        name=name,
        data=data,
        steps=steps,
        make=lambda seed: seeded(GPT, len(symbols), CONTEXT, width, layers, heads, seed=seed),
        draw=partial(draw, tokens[:cut]),
        validation=[draw(tokens[cut:], held_out) for _ in range(16)],
        loss=lambda logits, targets: nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()),
    )


# ---- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Square images with values from 0 to 1, (n, side, side), and their classes."""

    data: str
    train: Batch
    test: Batch

    @property
    def side(self) -> int:
        return self.train.inputs.shape[-1]

    def task(
        self,
        name: str,
        steps: int,
        batch: int,
        make: Callable[[int], nn.Module],
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        copies: bool = False,
    ) -> Task:
        """To tell the class of an image, or to give the image itself again (``copies``)."""
        train, test = ((Batch(part[0], part[0]) if copies else part) for part in (self.train, self.test))

        def draw(generator: torch.Generator) -> Batch:
            chosen = torch.randint(len(train.inputs), (batch,), generator=generator)
            return Batch(train.inputs[chosen], train.targets[chosen])

        first = min(1000, len(test.inputs))
        validation = Batch(test.inputs[:first], test.targets[:first])
        return Task(name, self.data, steps, make, draw, [validation], loss)


def read_images(path: Path | None) -> Images:
    """Images ``xtr``, ``xte`` of bytes and classes ``ytr``, ``yte`` of a file, or else scikit-learn's digits."""
    if find_spec("numpy") is None:
        raise SystemExit("images need NumPy: pip install numpy")
    import numpy as np

    if path is None:
        return _digits()
    raw = path.read_bytes()
    arrays = np.load(io.BytesIO(lzma.decompress(raw) if path.suffix == ".xz" else raw))
    parts = [
        Batch(torch.from_numpy(arrays[f"x{part}"]).float() / 255, torch.from_numpy(arrays[f"y{part}"]).long())
        for part in ("tr", "te")
    ]
    sizes = f"{len(parts[0].inputs)} and {len(parts[1].inputs)} images of {parts[0].inputs.shape[-1]} pixels squared"
    return Images(f"{path.name}, {sizes}", *parts)


def _digits() -> Images:
    if find_spec("sklearn") is None:
        raise SystemExit("without --images FILE the images are scikit-learn's: pip install scikit-learn")
    from sklearn.datasets import load_digits

    x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    x, y = x.float().unflatten(1, (8, 8)) / 16, y.long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, rest = order[:360], order[360:]
    # 1437 images are soon learnt by heart: each is there in nine places.
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    moved = torch.cat([x[rest].roll(shift, (1, 2)) for shift in shifts])
    train = Batch(moved, y[rest].repeat(len(shifts)))
    return Images(f"scikit-learn's digits, {len(moved)} (shifted) and 360 images", train, Batch(x[test], y[test]))


def pixel_divergence(logits: Tensor, pixels: Tensor) -> Tensor:
    """Kullback-Leibler divergence of Bernoulli pixels, summed over an image: cross-entropy, but zero at best."""
    entropy = nn.functional.binary_cross_entropy(pixels, pixels, reduction="sum")
    crossed = nn.functional.binary_cross_entropy_with_logits(logits, pixels, reduction="sum")
    return (crossed - entropy) / len(pixels)


def autoencoder(images: Images, steps: int = 800, batch: int = 256) -> Task:
    def make(seed: int) -> nn.Module:
        return seeded(Autoencoder, images.side**2, seed=seed)

    return images.task("autoencoder", steps, batch, make, pixel_divergence, copies=True)


def convnet(images: Images, steps: int = 600, batch: int = 128) -> Task:
    def make(seed: int) -> nn.Module:
        return seeded(ConvNet, images.side, seed=seed)

    return images.task("convnet", steps, batch, make, nn.functional.cross_entropy)


def vit(images: Images, steps: int = 600, batch: int = 64, width: int = 64, layers: int = 4) -> Task:
    patch = 4 if images.side % 4 == 0 and images.side >= 16 else 2

    def make(seed: int) -> nn.Module:
        return seeded(VisionTransformer, images.side, patch, width, layers, 4, seed=seed)

    return images.task("vit", steps, batch, make, nn.functional.cross_entropy)


IMAGE_TASKS = {"autoencoder": autoencoder, "convnet": convnet, "vit": vit}
LARGE = partial(gpt, name="gpt-10m", steps=1000, batch=16, width=384, layers=6, heads=6)
TEXT_TASKS: dict[str, Callable[[Path | None], Task]] = {"gpt": gpt, "gpt-10m": LARGE}
NAMES = ["gpt", *IMAGE_TASKS]
"""The tasks unless others are asked for; ``gpt-10m`` takes half an hour for each run."""
ALL_NAMES = [*TEXT_TASKS, *IMAGE_TASKS]


def tasks(names: Sequence[str], text: Path | None = None, images: Path | None = None) -> Iterator[Task]:
    """Yield the tasks of these names, one after the other; images are read once."""
    pictures = cache(lambda: read_images(images))
    for name in names:
        yield IMAGE_TASKS[name](pictures()) if name in IMAGE_TASKS else TEXT_TASKS[name](text)
