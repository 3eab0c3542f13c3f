"""Small models of the architectures that people train, from configurations, with a loss on learnable data.

Text is the manual that comes with Python, byte by byte; images are scikit-learn's digits, enlarged; sounds are the text
as a pattern or a tone for each byte, to be transcribed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import manual
import torch
import transformers
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    BertConfig,
    ConvNextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    ResNetConfig,
    T5Config,
    ViTConfig,
    Wav2Vec2Config,
    WhisperConfig,
)

WORDS = 260
"""Bytes, and after them a padding, a begin, an end and a mask."""
PAD, BEGIN, END, MASK = 256, 257, 258, 259
BATCH, LENGTH = 8, 64
SIZE = 32  # of images
SPOKEN, FRAMES = 12, 4  # bytes that are heard, and frames that each of them lasts


@dataclass(frozen=True)
class Task:
    """An architecture with its data: ``loss(model, generator)`` of a batch that the generator draws."""

    name: str
    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, torch.Generator], Tensor]
    is_language_model: bool = False


text = cache(manual.manual)


@cache
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8.0 - 1.0
    return nn.functional.interpolate(pixels, SIZE).expand(-1, 3, -1, -1).contiguous(), torch.tensor(labels)


def windows(generator: torch.Generator, length: int = LENGTH, count: int = BATCH) -> Tensor:
    return manual.windows(text(), count, length, generator)


# ---- losses ----


def causal(model: nn.Module, generator: torch.Generator) -> Tensor:
    tokens = windows(generator)
    return model(input_ids=tokens, labels=tokens).loss


def masked(model: nn.Module, generator: torch.Generator) -> Tensor:
    tokens = windows(generator)
    hidden = torch.rand(tokens.shape, generator=generator) < 0.15
    return model(input_ids=tokens.masked_fill(hidden, MASK), labels=tokens.masked_fill(~hidden, -100)).loss


def continued(model: nn.Module, generator: torch.Generator) -> Tensor:
    """Read the first half, write the second one."""
    first, second = windows(generator).chunk(2, dim=1)
    return model(input_ids=first, labels=second.contiguous()).loss


def transcribed(model: nn.Module, generator: torch.Generator) -> Tensor:
    """Hear each byte as a pattern of 16 bands that lasts some frames, in noise."""
    spoken = windows(generator, SPOKEN)
    bands = torch.randn(WORDS, 16, generator=torch.Generator().manual_seed(0))[spoken].repeat_interleave(FRAMES, dim=1)
    heard = bands + 0.1 * torch.randn(bands.shape, generator=generator)
    return model(input_features=heard.transpose(1, 2), labels=spoken).loss


def in_tones(model: nn.Module, generator: torch.Generator) -> Tensor:
    """Hear each byte, modulo 16, as a tone, and align it by the CTC loss."""
    spoken = windows(generator, SPOKEN) % 16 + 1
    time, duration = torch.arange(320.0), 2 * torch.pi * spoken.repeat_interleave(320, dim=1) / 40.0
    sound = torch.sin(duration * time.repeat(SPOKEN)) + 0.1 * torch.randn(duration.shape, generator=generator)
    return model(input_values=sound, labels=spoken).loss


def classified(model: nn.Module, generator: torch.Generator) -> Tensor:
    images, labels = digits()
    chosen = torch.randint(len(labels), (4 * BATCH,), generator=generator)
    return model(pixel_values=images[chosen], labels=labels[chosen]).loss


# ---- models ----


def built(kind: str, config: PreTrainedConfig) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, kind)(config)


class Adapted(nn.Module):
    """A linear layer that stays, with an adapter of low rank that is trained (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.lora_B(self.lora_A(x))


def adapted() -> nn.Module:
    """A Llama of random weights, of which adapters, norms and the output layer are trained."""
    model = built("LlamaForCausalLM", LlamaConfig(**COMMON, tie_word_embeddings=False))()
    for name, param in model.named_parameters():
        param.requires_grad_("norm" in name or "lm_head" in name)
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, module in linear:
        if "proj" in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Adapted(module, rank=8))
    return model


COMMON: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 32}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128, "num_experts": 4, "norm_topk_prob": True}
IMAGES = {"num_labels": 10, "num_channels": 3}
WITHOUT_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)

WHISPER = WhisperConfig(
    vocab_size=WORDS, num_mel_bins=16, d_model=96, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, max_source_positions=SPOKEN * FRAMES // 2,
    max_target_positions=32, pad_token_id=PAD, bos_token_id=BEGIN, eos_token_id=END, decoder_start_token_id=BEGIN,
)  # fmt: skip
WAV2VEC2 = Wav2Vec2Config(
    vocab_size=17, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
    conv_dim=(32, 32, 64), conv_kernel=(10, 8, 4), conv_stride=(5, 8, 2), num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0, apply_spec_augment=False, pad_token_id=0,
    ctc_loss_reduction="mean", ctc_zero_infinity=True,
)  # fmt: skip
GPT2 = GPT2Config(
    vocab_size=WORDS, n_embd=128, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    bos_token_id=BEGIN, eos_token_id=END,
)  # fmt: skip
T5 = T5Config(
    vocab_size=WORDS, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_decoder_layers=2, num_heads=4, dropout_rate=0.0,
    pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=BEGIN,
)  # fmt: skip
MAMBA = MambaConfig(vocab_size=WORDS, hidden_size=128, num_hidden_layers=2, state_size=8, pad_token_id=PAD)
VIT = ViTConfig(
    hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, image_size=SIZE, patch_size=8,
    **IMAGES, **WITHOUT_DROPOUT,
)  # fmt: skip
CONVNEXT = ConvNextConfig(hidden_sizes=[32, 64, 96], depths=[1, 1, 2], num_stages=3, patch_size=2, **IMAGES)
RESNET = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic", **IMAGES)

TASKS = [
    Task("Llama", built("LlamaForCausalLM", LlamaConfig(**COMMON, tie_word_embeddings=False)), causal, True),
    Task("Qwen3, tied", built("Qwen3ForCausalLM", Qwen3Config(**GROUPED, tie_word_embeddings=True)), causal, True),
    Task("GPT-2, tied", built("GPT2LMHeadModel", GPT2), causal, True),
    Task("Mixtral", built("MixtralForCausalLM", MixtralConfig(**GROUPED, num_local_experts=4)), causal, True),
    Task("Qwen3-MoE", built("Qwen3MoeForCausalLM", Qwen3MoeConfig(**GROUPED, **EXPERTS)), causal, True),
    Task("Mamba", built("MambaForCausalLM", MAMBA), causal, True),
    Task("Llama, LoRA", adapted, causal, True),
    Task("BERT", built("BertForMaskedLM", BertConfig(**COMMON, **WITHOUT_DROPOUT)), masked, True),
    Task("T5", built("T5ForConditionalGeneration", T5), continued, True),
    Task("Whisper", built("WhisperForConditionalGeneration", WHISPER), transcribed, True),
    Task("wav2vec2", built("Wav2Vec2ForCTC", WAV2VEC2), in_tones),
    Task("ViT", built("ViTForImageClassification", VIT), classified),
    Task("ConvNeXt", built("ConvNextForImageClassification", CONVNEXT), classified),
    Task("ResNet", built("ResNetForImageClassification", RESNET), classified),
]
