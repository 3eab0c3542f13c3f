"""More architectures that classify images, on the data and losses of `models.py`."""

from types import SimpleNamespace

import torch
from models import IMAGES, SIZE, WITHOUT_DROPOUT, Task, built, classified
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    BitConfig,
    ConvNextV2Config,
    FocalNetConfig,
    HGNetV2Config,
    MobileNetV1Config,
    MobileViTConfig,
    PoolFormerConfig,
    PvtV2Config,
    SwiftFormerConfig,
)

CLASSES = 10


class Classifier(nn.Module):
    """A network with the calls and the loss of transformers' models for images."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=cross_entropy(self.layers(pixel_values), labels))


class DenseBlock(nn.Module):
    """Layers that each see the outputs of all before (Huang et al. 2016, arXiv 1608.06993)."""

    def __init__(self, inputs: int, layers: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.layer(inputs + k * growth, growth) for k in range(layers))

    @staticmethod
    def layer(inputs: int, growth: int) -> nn.Module:
        return nn.Sequential(
            *(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, 4 * growth, 1, bias=False)),
            *(nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return x


def densenet() -> nn.Module:
    return Classifier(
        *(nn.Conv2d(3, 24, 3, padding=1), DenseBlock(24, 4, 12), nn.Conv2d(72, 36, 1), nn.AvgPool2d(2)),
        *(DenseBlock(36, 4, 12), nn.Conv2d(84, 42, 1), nn.AvgPool2d(2), DenseBlock(42, 4, 12)),
        *(nn.BatchNorm2d(90), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(90, CLASSES)),
    )


def vgg() -> nn.Module:
    def level(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    head = [nn.Flatten(), nn.Linear(2048, 128), nn.ReLU(), nn.Linear(128, CLASSES)]
    return Classifier(*level(3, 32), *level(32, 64), *level(64, 128), *head)


class Mixer(nn.Module):
    """A layer that mixes patches, then channels (Tolstikhin et al. 2021, arXiv 2105.01601)."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.patches, self.channels = self.mlp(patches), self.mlp(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    @staticmethod
    def mlp(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(self.norms[0](x).mT).mT
        return x + self.channels(self.norms[1](x))


class MixerNet(Classifier):
    def __init__(self, width: int = 96) -> None:
        super().__init__(*(Mixer((SIZE // 4) ** 2, width) for _ in range(3)), nn.LayerNorm(width))
        self.patches, self.head = nn.Conv2d(3, width, 4, 4), nn.Linear(width, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> SimpleNamespace:
        x = self.layers(self.patches(pixel_values).flatten(2).mT)
        return SimpleNamespace(loss=cross_entropy(self.head(x.mean(1)), labels))


FOUR = {"depths": [1, 1, 2, 1], "hidden_sizes": [32, 48, 64, 96]}
MOBILEVIT = MobileViTConfig(
    image_size=SIZE, hidden_sizes=[48, 64, 80], neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 96],
    classifier_dropout_prob=0.0, **WITHOUT_DROPOUT, **IMAGES,
)  # fmt: skip
FOCALNET = FocalNetConfig(
    image_size=SIZE, patch_size=2, embed_dim=32, depths=[1, 1, 2], focal_levels=[2, 2, 2], focal_windows=[3, 3, 3],
    hidden_sizes=[32, 64, 128], **IMAGES,
)  # fmt: skip
PVT = PvtV2Config(
    image_size=SIZE, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4], **IMAGES
)
HGNET = HGNetV2Config(
    embedding_size=16, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], stem_channels=[3, 8, 16],
    stage_in_channels=[16, 32, 64, 96], stage_mid_channels=[8, 16, 24, 32], stage_out_channels=[32, 64, 96, 128],
    stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[2, 2, 2, 2], **IMAGES,
)  # fmt: skip
MOBILENET_V1 = MobileNetV1Config(image_size=SIZE, depth_multiplier=0.25, classifier_dropout_prob=0.0, **IMAGES)
BIT = BitConfig(embedding_size=32, num_groups=8, **FOUR, **IMAGES)
SWIFTFORMER = SwiftFormerConfig(image_size=SIZE, depths=[1, 1, 2, 1], embed_dims=[24, 32, 48, 64], **IMAGES)

VISION = [
    Task("PoolFormer", built("PoolFormerForImageClassification", PoolFormerConfig(**FOUR, **IMAGES)), classified),
    Task(
        "ConvNeXt V2",
        built("ConvNextV2ForImageClassification", ConvNextV2Config(**FOUR, patch_size=2, **IMAGES)),
        classified,
    ),
    Task("FocalNet", built("FocalNetForImageClassification", FOCALNET), classified),
    Task("PVT v2", built("PvtV2ForImageClassification", PVT), classified),
    Task("SwiftFormer", built("SwiftFormerForImageClassification", SWIFTFORMER), classified),
    Task("MobileViT", built("MobileViTForImageClassification", MOBILEVIT), classified),
    Task("MLP-Mixer", MixerNet, classified),
    Task("MobileNetV1", built("MobileNetV1ForImageClassification", MOBILENET_V1), classified),
    Task("HGNet v2", built("HGNetV2ForImageClassification", HGNET), classified),
    Task("BiT", built("BitForImageClassification", BIT), classified),
    Task("DenseNet", densenet, classified),
    Task("VGG", vgg, classified),
]
