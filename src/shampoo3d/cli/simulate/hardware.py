"""Hardware described by a few rates: what an operation, a collective and a step of training take on it. Pure."""

from __future__ import annotations

import bisect
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shampoo3d.cli.train.settings import RunError


@dataclass(frozen=True)
class Curve:
    """A positive number by size, both on logarithmic scales: linear between the sizes given, constant beyond."""

    points: Mapping[float, float]

    def __post_init__(self) -> None:
        points = {float(size): float(value) for size, value in sorted((float(a), b) for a, b in self.points.items())}
        if not points or not all(0 < number < math.inf for pair in points.items() for number in pair):
            raise ValueError(f"a curve needs sizes with numbers above 0, got {dict(self.points)}")
        object.__setattr__(self, "points", points)

    def at(self, size: float) -> float:
        """Return the number at a size."""
        sizes = [*self.points]
        after = bisect.bisect_right(sizes, size)
        if after in (0, len(sizes)):
            return self.points[sizes[max(0, after - 1)]]
        a, b = sizes[after - 1], sizes[after]
        share = math.log(size / a) / math.log(b / a)
        return float(self.points[a] ** (1 - share) * self.points[b] ** share)


@dataclass(frozen=True)
class Link:
    """A way between two ranks: seconds until something arrives, and then bytes per second, in each direction."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Hardware:
    """Rates of a machine. Seconds, bytes and multiply-adds.

    Attributes:
        products: multiply-adds per second of batched matrix products, by dtype and by the cube root of those of one.
        memory: bytes per second, read and written, of operations on single elements, by the bytes of one.
        decompositions: seconds for one matrix, "eigh" or "qr", by its side.
        operation: the host's for an operation of a step, views included, with the Python around it.
        kernel: the device's for an operation, however small.
        step: the host's for a step besides its operations.
        tensor, shard: the host's beside that for each tensor of the parameter groups; if it is a ``DTensor``, for that.
        inside, between: links between two ranks of a node and of two nodes; the latter is each rank's own.
        node: ranks of a node.
        training: multiply-adds per second of forward and backward passes.
        queue: the host launches operations and goes on while the device works on them; else it does them itself.
        overlap: what travels does so beside the computation; else it takes a rank's time.
    """

    name: str
    products: Mapping[str, Curve]
    memory: Curve
    decompositions: Mapping[str, Curve]
    operation: float
    kernel: float
    step: float
    tensor: float
    shard: float
    inside: Link
    between: Link
    node: int
    training: float
    queue: bool = True
    overlap: bool = True

    def __post_init__(self) -> None:
        for name in ("operation", "kernel", "step", "tensor", "shard"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be seconds from 0 on, not {getattr(self, name)}")
        if self.node < 1 or not self.training > 0:
            raise ValueError(f"node and training must be above 0, not {self.node} and {self.training}")
        for link in (self.inside, self.between):
            if not (0 <= link.latency < math.inf and link.bandwidth > 0):
                raise ValueError(f"a link needs a latency from 0 on and a bandwidth above 0, not {link}")

    # ---- operations of a rank ----------------------------------------------------------------------------------------

    def product(self, dtype: str, count: int, m: int, n: int, k: int) -> float:
        """Return the seconds of ``count`` products (m, k) x (k, n)."""
        if dtype not in self.products:
            raise RunError(f"hardware {self.name} has no rate of products in {dtype}: add it to its file")
        return count * m * n * k / self.products[dtype].at((m * n * k) ** (1 / 3)) if m * n * k else 0.0

    def moved(self, size: float) -> float:
        """Return the seconds in which an operation on single elements reads and writes so many bytes."""
        return size / self.memory.at(size) if size else 0.0

    def decomposition(self, name: str, count: int, d: int) -> float:
        """Return the seconds of a decomposition of ``count`` d x d matrices; with the cube of d beyond the curve."""
        if name not in self.decompositions:
            raise RunError(f"hardware {self.name} has no seconds of the decomposition {name}: add them to its file")
        curve = self.decompositions[name]
        return count * curve.at(d) * max(1.0, d / max(curve.points)) ** 3

    # ---- collectives -------------------------------------------------------------------------------------------------

    def all_to_all(self, rank: int, ranks: Sequence[int], sent: Sequence[int], received: Sequence[int]) -> float:
        """Return the seconds of a rank's part in an uneven all-to-all: the bytes to and from each of ``ranks``."""
        totals = [Counter[bool](), Counter[bool]()]
        peers: Counter[bool] = Counter()
        for peer, *sizes in zip(ranks, sent, received, strict=True):
            if peer != rank:
                far = peer // self.node != rank // self.node
                peers[far] += any(sizes)
                for total, size in zip(totals, sizes, strict=True):
                    total[far] += size
        links = {False: self.inside, True: self.between}
        busy = [max(total[far] for total in totals) / links[far].bandwidth for far in links]
        return self._latency(ranks) + max(busy)

    def all_gather(self, ranks: Sequence[int], size: int) -> float:
        """Return the seconds of an all-gather of ``size`` bytes of each rank, around a ring through all nodes.

        Each node has as many links to others as members there.
        """
        nodes = Counter(rank // self.node for rank in ranks)
        received = (len(ranks) - 1) * size
        seconds = received / self.inside.bandwidth if len(ranks) > len(nodes) else 0.0
        if len(nodes) > 1:
            seconds = max(seconds, received / (self.between.bandwidth * min(nodes.values())))
        return self._latency(ranks) + seconds

    def all_reduce(self, ranks: Sequence[int], size: int) -> float:
        """Return the seconds of an all-reduce of ``size`` bytes, by a reduce-scatter and an all-gather."""
        return 2 * self.all_gather(ranks, math.ceil(size / len(ranks)))

    def _latency(self, ranks: Sequence[int]) -> float:
        """Return the latency of a collective: that of a tree, as many hops as the ranks can be halved."""
        nodes = len({rank // self.node for rank in ranks})
        hops = math.ceil(math.log2(nodes))
        return hops * self.between.latency + (math.ceil(math.log2(len(ranks))) - hops) * self.inside.latency

    # ---- files -------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Return it as JSON, for :meth:`from_json`."""

        def plain(of: Any) -> Any:
            if isinstance(of, Curve):
                return {str(size): value for size, value in of.points.items()}
            return asdict(of)

        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps(data, default=plain, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Hardware:
        """Read what :meth:`to_json` has written.

        Raises:
            KeyError, TypeError, ValueError: saying what it lacks.
        """
        of: dict[str, Any] = json.loads(text)
        curves = {name: {key: Curve(points) for key, points in of[name].items()} for name in _TABLES}
        links = {name: Link(**of[name]) for name in ("inside", "between")}
        return cls(**of | curves | links | {"memory": Curve(of["memory"])})


_TABLES = ("products", "decompositions")


def hardware_of(text: str) -> Hardware:
    """Return a preset by its name, or read a file that `shampoo3d calibrate` wrote.

    Raises:
        RunError: naming the presets, or what is wrong with the file.
    """
    from .presets import PRESETS

    if text in PRESETS:
        return PRESETS[text]
    path = Path(text)
    if not path.is_file():
        names = ", ".join(PRESETS)
        raise RunError(f"--hardware {text} is neither one of {names} nor a file of `shampoo3d calibrate`")
    try:
        return Hardware.from_json(path.read_text())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"--hardware {text} describes no hardware: {type(error).__name__}: {error}") from None
