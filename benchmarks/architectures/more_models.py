"""More architectures, on the data and losses of `models.py`."""

from typing import Any

import torch
from models import (
    BEGIN,
    COMMON,
    END,
    GROUPED,
    IMAGES,
    PAD,
    SIZE,
    WITHOUT_DROPOUT,
    WORDS,
    Task,
    built,
    causal,
    classified,
    continued,
    digits,
    masked,
    windows,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import (
    AlbertConfig,
    BartConfig,
    BloomConfig,
    DebertaV2Config,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    MobileNetV2Config,
    OPTConfig,
    PhiConfig,
    RegNetConfig,
    RwkvConfig,
    SwinConfig,
)


class Recurrent(nn.Module):
    """Two layers of LSTM between an embedding and an output layer."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        self.layers = nn.LSTM(width, width, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.embedding(tokens))[0])
        return logits


def next_byte(model: nn.Module, generator: torch.Generator) -> Tensor:
    tokens = windows(generator)
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class UNet(nn.Module):
    """Two levels down and up, with skips; it is told the time."""

    def __init__(self) -> None:
        super().__init__()
        self.begin, self.time = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(1, 96)
        self.down = nn.ModuleList([self.layer(32, 64, nn.Conv2d, 3), self.layer(64, 96, nn.Conv2d, 3)])
        self.up = nn.ModuleList([self.layer(96, 64, nn.ConvTranspose2d, 4), self.layer(128, 32, nn.ConvTranspose2d, 4)])
        self.end = nn.Conv2d(64, 3, 3, padding=1)

    @staticmethod
    def layer(inputs: int, outputs: int, kind: type[nn.Module], size: int) -> nn.Module:
        return nn.Sequential(nn.GroupNorm(4, inputs), nn.SiLU(), kind(inputs, outputs, size, stride=2, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        levels = [self.begin(x)]
        for layer in self.down:
            levels.append(layer(levels[-1]))
        x = levels.pop() + self.time(t)[:, :, None, None]
        for layer in self.up:
            x = torch.cat([layer(x), levels.pop()], dim=1)
        out: Tensor = self.end(x)
        return out


def denoised(model: nn.Module, generator: torch.Generator) -> Tensor:
    """Tell the way from an image to noise, at a point between them (Liu et al. 2022, arXiv 2209.03003)."""
    images, _ = digits()
    x = images[torch.randint(len(images), (16,), generator=generator)]
    t, noise = torch.rand(len(x), 1, generator=generator), torch.randn(x.shape, generator=generator)
    between = torch.lerp(x, noise, t[:, :, None, None])
    return mse_loss(model(between, t), noise - x)


FEW = {"vocab_size": WORDS, "pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END}
OPT = OPTConfig(
    **FEW, hidden_size=128, word_embed_proj_dim=128, ffn_dim=384, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, dropout=0.0,
)  # fmt: skip
BLOOM = BloomConfig(**FEW, hidden_size=128, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0)
DEEPSEEK = DeepseekV3Config(
    **COMMON, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=128,
    q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32, first_k_dense_replace=1,
)  # fmt: skip
RWKV = RwkvConfig(vocab_size=WORDS, hidden_size=128, num_hidden_layers=2, context_length=128)
ALBERT = AlbertConfig(**COMMON, **WITHOUT_DROPOUT, embedding_size=64)
DEBERTA = DebertaV2Config(
    **COMMON, **WITHOUT_DROPOUT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=32
)
HALVES: dict[str, Any] = {
    f"{half}_{what}": number
    for half in ("encoder", "decoder")
    for what, number in {"layers": 2, "ffn_dim": 256, "attention_heads": 4}.items()
}
BART = BartConfig(
    **FEW, **HALVES, d_model=128, max_position_embeddings=128, decoder_start_token_id=END, forced_eos_token_id=END,
    dropout=0.0,
)  # fmt: skip
SWIN = SwinConfig(
    image_size=SIZE, patch_size=2, embed_dim=32, depths=[1, 1, 2], num_heads=[2, 2, 4], window_size=4,
    drop_path_rate=0.0, **IMAGES,
)  # fmt: skip
MOBILENET = MobileNetV2Config(image_size=SIZE, depth_multiplier=0.35, classifier_dropout_prob=0.0, **IMAGES)
REGNET = RegNetConfig(embedding_size=16, hidden_sizes=[32, 64, 96], depths=[1, 1, 2], groups_width=16, **IMAGES)

MORE = [
    Task("OPT", built("OPTForCausalLM", OPT), causal, True),
    Task("BLOOM", built("BloomForCausalLM", BLOOM), causal, True),
    Task("GPT-NeoX", built("GPTNeoXForCausalLM", GPTNeoXConfig(**COMMON)), causal, True),
    Task("Falcon", built("FalconForCausalLM", FalconConfig(**COMMON)), causal, True),
    Task("Gemma 2", built("Gemma2ForCausalLM", Gemma2Config(**GROUPED)), causal, True),
    Task("Phi", built("PhiForCausalLM", PhiConfig(**COMMON)), causal, True),
    Task("DeepSeek-V3", built("DeepseekV3ForCausalLM", DEEPSEEK), causal, True),
    Task("RWKV", built("RwkvForCausalLM", RWKV), causal, True),
    Task("LSTM", Recurrent, next_byte, True),
    Task("DeBERTa", built("DebertaV2ForMaskedLM", DEBERTA), masked, True),
    Task("ALBERT", built("AlbertForMaskedLM", ALBERT), masked, True),
    Task("BART", built("BartForConditionalGeneration", BART), continued, True),
    Task("Swin", built("SwinForImageClassification", SWIN), classified),
    Task("MobileNetV2", built("MobileNetV2ForImageClassification", MOBILENET), classified),
    Task("RegNet", built("RegNetForImageClassification", REGNET), classified),
    Task("U-Net", UNet, denoised),
]  # fmt: skip
