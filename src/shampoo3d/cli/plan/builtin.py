"""Parameters of well-known models by their names, made from a few numbers each; in the order of the models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.blocks import Split

EMBEDDING, HEAD = "embedding", "output layer"


@dataclass(frozen=True)
class Parameter:
    """A parameter of a model, whole.

    Attributes:
        role: "embedding", "output layer" or empty.
        kernel: True for a convolution's.
        split: by axis, the matrices that it is, if several.
        transposed: True if rows are inputs and columns outputs.
        active: the share of it that computes for one token: experts that are chosen.
    """

    name: str
    shape: Shape
    role: str = ""
    kernel: bool = False
    transposed: bool = False
    active: float = 1.0
    dtype: str = "float32"
    split: Split = ()


def gpt2(layers: int, width: int) -> Iterator[Parameter]:
    """Yield the parameters of a GPT-2, whose output layer is its embedding."""
    yield Parameter("transformer.wte.weight", (50257, width), EMBEDDING)
    yield Parameter("transformer.wpe.weight", (1024, width), EMBEDDING)
    linear = (("attn.c_attn", width, 3 * width), ("attn.c_proj", width, width))
    perceptron = (("mlp.c_fc", width, 4 * width), ("mlp.c_proj", 4 * width, width))
    for name in (f"transformer.h.{i}" for i in range(layers)):
        for norm, some in (("ln_1", linear), ("ln_2", perceptron)):
            yield from _normed(f"{name}.{norm}", width)
            for inner, inputs, outputs in some:
                fused = ((1, 3),) if outputs == 3 * width else ()
                yield Parameter(f"{name}.{inner}.weight", (inputs, outputs), transposed=True, split=fused)
                yield Parameter(f"{name}.{inner}.bias", (outputs,))
    yield from _normed("transformer.ln_f", width)


def llama(
    layers: int,
    width: int,
    hidden: int,
    heads: int,
    keys: int,
    vocabulary: int,
    *,
    normed: bool = False,
    experts: int = 0,
    chosen: int = 0,
) -> Iterator[Parameter]:
    """Yield the parameters of a Llama or a Qwen: heads of 128, fewer of keys and values; perhaps experts."""
    yield Parameter("model.embed_tokens.weight", (vocabulary, width), EMBEDDING)
    for name in (f"model.layers.{i}" for i in range(layers)):
        for inner, rows in (("q", 128 * heads), ("k", 128 * keys), ("v", 128 * keys)):
            yield Parameter(f"{name}.self_attn.{inner}_proj.weight", (rows, width))
        yield Parameter(f"{name}.self_attn.o_proj.weight", (width, 128 * heads))
        for inner in ("q_norm", "k_norm") if normed else ():
            yield Parameter(f"{name}.self_attn.{inner}.weight", (128,))
        if experts:
            active = chosen / experts
            yield Parameter(f"{name}.mlp.experts.gate_up_proj", (experts, 2 * hidden, width), active=active)
            yield Parameter(f"{name}.mlp.experts.down_proj", (experts, width, hidden), active=active)
            yield Parameter(f"{name}.mlp.gate.weight", (experts, width))
        else:
            yield Parameter(f"{name}.mlp.gate_proj.weight", (hidden, width))
            yield Parameter(f"{name}.mlp.up_proj.weight", (hidden, width))
            yield Parameter(f"{name}.mlp.down_proj.weight", (width, hidden))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield Parameter(f"{name}.{norm}.weight", (width,))
    yield Parameter("model.norm.weight", (width,))
    yield Parameter("lm_head.weight", (vocabulary, width), HEAD)


def resnet(layers: tuple[int, ...]) -> Iterator[Parameter]:
    """Yield the parameters of a ResNet of bottlenecks."""

    def convolution(name: str, norm: str, outputs: int, inputs: int, side: int) -> Iterator[Parameter]:
        yield Parameter(f"{name}.weight", (outputs, inputs, side, side), kernel=True)
        yield from _normed(norm, outputs)

    yield from convolution("conv1", "bn1", 64, 3, 7)
    inputs = 64
    for number, blocks in enumerate(layers):
        width = 64 * 2**number
        for i in range(blocks):
            name = f"layer{number + 1}.{i}"
            for j, shape in enumerate(((width, inputs, 1), (width, width, 3), (4 * width, width, 1)), 1):
                yield from convolution(f"{name}.conv{j}", f"{name}.bn{j}", *shape)
            if i == 0:
                yield from convolution(f"{name}.downsample.0", f"{name}.downsample.1", 4 * width, inputs, 1)
            inputs = 4 * width
    yield Parameter("fc.weight", (1000, inputs))
    yield Parameter("fc.bias", (1000,))


def vit(layers: int, width: int) -> Iterator[Parameter]:
    """Yield the parameters of a vision transformer for 14 x 14 patches of 16 x 16 pixels."""
    yield Parameter("cls_token", (1, 1, width))
    yield Parameter("pos_embed", (1, 14 * 14 + 1, width))
    yield Parameter("patch_embed.proj.weight", (width, 3, 16, 16), kernel=True)
    yield Parameter("patch_embed.proj.bias", (width,))
    linear = (("attn.qkv", width, 3 * width), ("attn.proj", width, width))
    perceptron = (("mlp.fc1", width, 4 * width), ("mlp.fc2", 4 * width, width))
    for name in (f"blocks.{i}" for i in range(layers)):
        for norm, some in (("norm1", linear), ("norm2", perceptron)):
            yield from _normed(f"{name}.{norm}", width)
            for inner, inputs, outputs in some:
                yield Parameter(f"{name}.{inner}.weight", (outputs, inputs))
                yield Parameter(f"{name}.{inner}.bias", (outputs,))
    yield from _normed("norm", width)
    yield Parameter("head.weight", (1000, width))
    yield Parameter("head.bias", (1000,))


def _normed(name: str, width: int) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (width,))
    yield Parameter(f"{name}.bias", (width,))


BUILT_IN = {
    "gpt2": lambda: gpt2(12, 768),
    "gpt2-medium": lambda: gpt2(24, 1024),
    "gpt2-large": lambda: gpt2(36, 1280),
    "gpt2-xl": lambda: gpt2(48, 1600),
    "llama-3-8b": lambda: llama(32, 4096, 14336, 32, 8, 128256),
    "llama-3-70b": lambda: llama(80, 8192, 28672, 64, 8, 128256),
    "llama-3-405b": lambda: llama(126, 16384, 53248, 128, 8, 128256),
    "qwen3-32b": lambda: llama(64, 5120, 25600, 64, 8, 151936, normed=True),
    "qwen3-235b-a22b": lambda: llama(94, 4096, 1536, 64, 4, 151936, normed=True, experts=128, chosen=8),
    "resnet-50": lambda: resnet((3, 4, 6, 3)),
    "vit-l": lambda: vit(24, 1024),
}
