"""Texts without padding give what padded ones give."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from fairseq2.models.transformer import Flash2SDPA, TorchSDPA, set_default_sdpa_factory
from fairseq2.models.transformer.sdpa import flash2
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch, HeadConfig
from vembed_fs2.models.bert import BertConfig
from vembed_fs2.models.bert.factory import create_bert_model
from vembed_fs2.models.common import attention
from vembed_fs2.models.common.attention import PackedLayout, should_pack
from vembed_fs2.models.modernbert import ModernBertConfig
from vembed_fs2.models.modernbert.factory import create_modernbert_model

LENGTHS = [3, 21, 1, 8, 0]


def create(kind: str, pooling: Any = "mean", **options: Any) -> EmbeddingModel:
    torch.manual_seed(0)
    sizes: Any = {"model_dim": 24, "vocab_size": 50, "num_layers": 3, "num_attn_heads": 3, "ffn_inner_dim": 32}
    head = HeadConfig(pooling=pooling)
    if kind == "bert":
        return create_bert_model(BertConfig(**sizes, max_seq_len=32, head=head, **options)).eval()
    return create_modernbert_model(
        ModernBertConfig(**sizes, pad_idx=0, local_attn_window=6, head=head, **options)
    ).eval()


def create_batch() -> EncoderBatch:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    return EncoderBatch.of_text(torch.randint(5, 50, mask.shape, generator=generator), mask)


def encode(model: EmbeddingModel) -> tuple[Tensor, dict[str, Tensor]]:
    """What the model makes of the texts that have tokens, and gradients."""
    model.zero_grad()
    values, mask = model.encode_rows(create_batch())
    values = values[:-1] if mask is None else values[mask]
    (values * torch.linspace(-1, 1, values.numel()).view_as(values)).sum().backward()
    return values.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-5)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each batch that is packed."""
    seen: list[int] = []
    pack = PackedLayout.pack

    def spy(self: PackedLayout, seqs: Tensor) -> Tensor:
        packed = pack(self, seqs)
        if seqs.ndim == 3:
            seen.append(len(packed))
        return packed

    monkeypatch.setattr(PackedLayout, "pack", spy)
    return seen


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "none"])
def test_packed_equals_padded(kind: str, pooling: str, packs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = create(kind, pooling)
    packed = encode(model)
    assert packs == [sum(LENGTHS)]
    monkeypatch.setattr(attention, "_PACKED_FROM", 1.0)
    assert_same(packed, encode(model))
    assert packs == [sum(LENGTHS)]


def test_what_is_packed() -> None:
    mask = torch.ones(4, 10, dtype=torch.bool)
    assert not should_pack(mask, needed=True)
    mask[1, 9:] = False
    assert should_pack(mask, needed=True)
    assert not should_pack(mask, needed=False)
    mask[1:, 7:] = False
    assert should_pack(mask, needed=False)


def attend(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, causal: bool = False, window_size: Any = (-1, -1)
) -> Tensor:
    """What ``flash_attn_func`` computes. *Shape:* ``[N, S, H, K]``."""
    assert not causal
    assert dropout_p == 0.0
    positions = torch.arange(q.size(1))
    distance = positions - positions.unsqueeze(1)
    left, right = (q.size(1) if n < 0 else n for n in window_size)
    mask = (distance >= -left) & (distance <= right)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, begins_k: Tensor, longest: int, longest_k: int,
    dropout_p: float = 0.0, causal: bool = False, window_size: Any = (-1, -1),
) -> Tensor:  # fmt: skip
    """What ``flash_attn_varlen_func`` computes. *Shape:* ``[tokens, H, K]``."""
    assert begins.tolist() == begins_k.tolist()
    lengths = begins.diff().tolist()
    assert longest == longest_k == max(lengths)
    assert begins[-1] == len(q)
    parts = zip(*(x.unsqueeze(0).split(lengths, dim=1) for x in (q, k, v)))
    return torch.cat([attend(*p, dropout_p, causal, window_size) for p in parts], dim=1).squeeze(0)


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlashAttention 2 as the default, by functions that compute the same on CPUs."""
    module: Any = ModuleType("flash_attn")
    module.flash_attn_func, module.flash_attn_varlen_func = attend, attend_packed
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash2, "_has_flash_attn_2", True)
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        monkeypatch.setattr(flash2, name, getattr(module, name), raising=False)
    set_default_sdpa_factory(Flash2SDPA)
    yield
    set_default_sdpa_factory(TorchSDPA)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_flash_attention_gets_no_padding(kind: str, packs: list[int], request: pytest.FixtureRequest) -> None:
    expected = encode(create(kind))
    packs.clear()
    request.getfixturevalue("flash_attention")
    model = create(kind)
    assert_same(encode(model), expected)
    assert packs == [sum(LENGTHS)]
    full = EncoderBatch.of_text(torch.full((2, 9), 7), torch.ones(2, 9, dtype=torch.bool))
    torch.testing.assert_close(model.encode_text(full)[0], model.encode_text(full.select([1]))[0])
    assert packs == [sum(LENGTHS)]
