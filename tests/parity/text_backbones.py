"""What the tests of text backbones share: models with random weights, inputs, references, tokenizers, folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from vembed_fs2 import Embedder
from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch, HeadConfig
from vembed_fs2.embedding.model import Pooling as PoolingName
from vembed_fs2.models.family import CheckpointFormat

from .dropout_masks import assert_same_dropout

ACTIVATIONS = [
    "gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_accurate", "laplace",
    "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh",
]  # fmt: skip

TEXTS = [
    "a man is eating food",
    "x",
    "the quick brown fox jumps over the lazy dog, twice",
    "reshape a tensor without copying its data",
    "two women are sitting on a bench and talk about the weather",
]

LONG_TEXT = "the quick brown fox jumps over the lazy dog " * 40


def make_hf(name: str, config: dict[str, Any], *, seed: int = 0, **kwargs: Any) -> Any:
    """A model of transformers, ``name`` being what the names of its classes start with."""
    torch.manual_seed(seed)
    hf_config = getattr(transformers, f"{name}Config")(**config)
    model = getattr(transformers, f"{name}Model")(hf_config, **kwargs)
    add_noise(model)
    return model.eval()


def add_noise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # also what starts as zero


def load(
    fmt: CheckpointFormat, create: Callable[[Any], EmbeddingModel], hf: Any, head: HeadConfig | None = None
) -> Any:
    """Our model with the weights of ``hf``."""
    state = hf.state_dict()
    config = fmt.from_hf_config(hf.config.to_dict(), head=head, keys=frozenset(state))
    model = create(config)
    model.load_state_dict(fmt.from_hf_state_dict(state, config))
    return model.eval()


def make_inputs(vocab_size: int, lengths: Sequence[int], pad_id: int | None) -> tuple[Tensor, Tensor]:
    """Random ids and their mask. What is padded has the padding's id, and so may tokens."""
    ids = torch.randint(vocab_size, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return ids.masked_fill(~mask, pad_id or 0), mask


def reference_pool(states: Tensor, mask: Tensor, pooling: PoolingName) -> Tensor:
    rows = [row[m] for row, m in zip(states, mask)]
    match pooling:
        case "cls":
            return torch.stack([row[0] for row in rows])
        case "last":
            return torch.stack([row[-1] for row in rows])
        case "max":
            return torch.stack([row.amax(0) for row in rows])
        case _:
            return torch.stack([row.mean(0) for row in rows])


def max_diff(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def assert_round_trip(fmt: CheckpointFormat, create: Callable[[Any], EmbeddingModel], hf: Any) -> None:
    """The same tensors bit for bit, and the same values of the configuration."""
    model = load(fmt, create, hf)
    config = fmt.from_hf_config(hf.config.to_dict(), keys=frozenset(hf.state_dict()))
    back, expected = fmt.to_hg_state_dict(dict(model.state_dict()), config), hf.state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], expected[key]) for key in expected)
    hg_config = fmt.to_hg_config(config)
    assert getattr(transformers, hg_config.kls_name)(**hg_config.data).to_dict() == hf.config.to_dict()
    assert hg_config.arch == type(hf).__name__


def assert_gradients_equal(
    fmt: CheckpointFormat, create: Callable[[Any], EmbeddingModel], hf: Any, ids: Tensor, mask: Tensor
) -> None:
    """Of all parameters, for mean pooling; the models must be without dropout."""
    hf.train()
    model = load(fmt, create, hf, HeadConfig(pooling="mean")).train()
    expected = reference_pool(hf(ids, mask.long())[0], mask, "mean")
    direction = torch.randn_like(expected)
    (expected * direction).sum().backward()
    (model(EncoderBatch.of_text(ids, mask)).values * direction).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(grad is not None for grad in grads.values())  # DDP needs every one
    config = fmt.from_hf_config(hf.config.to_dict(), keys=frozenset(hf.state_dict()))
    back: dict[str, Any] = fmt.to_hg_state_dict(dict(grads), config)
    for name, parameter in hf.named_parameters():
        if name in back:
            assert max_diff(back[name], parameter.grad) <= 1e-5 * max(1.0, float(parameter.grad.abs().max())), name
        else:
            assert name.startswith("pooler.") or not parameter.requires_grad, name


def assert_dropout_equal(monkeypatch: Any, hf: Any, model: Any, ids: Tensor) -> None:
    """The same random numbers in the same order; ``hf`` must be without a kernel for attention."""
    batch, mask = EncoderBatch.of_text(ids), torch.ones_like(ids)
    assert_same_dropout(monkeypatch, hf, model, lambda: hf(ids, mask)[0], lambda: model.encode_tokens(batch))


def assert_independent_of_batch(model: Any, ids: Tensor, mask: Tensor, wide: EncoderBatch) -> None:
    """An embedding is the same alone, in another order, with wider padding, and with padding on the left.

    :param wide: a batch of one longer text.
    """
    batch = EncoderBatch.of_text(ids, mask)
    count, lengths = ids.size(0), mask.sum(1).tolist()
    left = [torch.stack([row.roll(ids.size(1) - n) for row, n in zip(t, lengths)]) for t in (ids, mask)]
    order = list(reversed(range(count)))
    with torch.no_grad():
        alone = torch.cat([model(batch.select([row])).values for row in range(count)])
        others = [
            model(batch).values,
            model(EncoderBatch.concat([batch, wide])).values[:count],
            model(batch.select(order)).values[order],
            model(EncoderBatch.of_text(*left)).values,
        ]
    for values in others:
        assert max_diff(values, alone) <= 1e-6


def write_wordpiece(folder: Path) -> None:
    """The tokenizer of DistilBERT, of few words."""
    words = sorted({word for text in TEXTS for word in text.replace(",", " ").split()})
    letters = "abcdefghijklmnopqrstuvwxyz,"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters), *words]
    folder.joinpath("vocab.txt").write_text("\n".join(dict.fromkeys(vocab)))
    transformers.DistilBertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


def write_mpnet_wordpiece(folder: Path) -> None:
    """The tokenizer of MPNet, of few words."""
    words = sorted({word for text in TEXTS for word in text.replace(",", " ").split()})
    letters = "abcdefghijklmnopqrstuvwxyz,"
    vocab = ["<s>", "<pad>", "</s>", "[UNK]", *letters, *(f"##{x}" for x in letters), *words, "<mask>"]
    folder.joinpath("vocab.txt").write_text("\n".join(dict.fromkeys(vocab)))
    transformers.MPNetTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


def write_bpe(folder: Path, kls_name: str, special: Sequence[str]) -> None:
    """A byte-level tokenizer as RoBERTa and ModernBERT have it; texts get the first and the third special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet)
    )
    _save(folder, tokenizer, kls_name, special)


def write_unigram(folder: Path, special: Sequence[str] = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")) -> None:
    """A tokenizer as XLM-RoBERTa has it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=list(special), unk_token="<unk>")
    tokenizer.train_from_iterator(TEXTS, trainer)
    _save(folder, tokenizer, "XLMRobertaTokenizerFast", special)


def _save(folder: Path, tokenizer: Tokenizer, kls_name: str, special: Sequence[str]) -> None:
    first, pad, last, unknown, mask = special
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(t, tokenizer.token_to_id(t)) for t in (first, last)]
    )
    names = {"bos_token": first, "cls_token": first, "eos_token": last, "sep_token": last}
    others = {"pad_token": pad, "unk_token": unknown, "mask_token": mask}
    kls = getattr(transformers, kls_name)
    fast = kls(tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **names, **others)
    fast.save_pretrained(folder)


def write_folder(
    folder: Path, name: str, config: dict[str, Any], write_tokenizer: Callable[[Path], None], tokenizer_limit: int
) -> Path:
    """A plain folder of transformers with a random model."""
    folder.mkdir()
    write_tokenizer(folder)
    edit(folder / "tokenizer_config.json", model_max_length=tokenizer_limit)
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    make_hf(name, {**config, "vocab_size": size}).save_pretrained(folder)
    return folder


def build(backbone: Path, folder: Path, pooling: str, *, max_seq_length: int | None) -> Path:
    """A folder of sentence-transformers."""
    transformer = Transformer(str(backbone), max_seq_length=max_seq_length)
    dim = transformers.AutoConfig.from_pretrained(backbone).hidden_size
    modules = [transformer, Pooling(dim, pooling), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    if max_seq_length is None:
        # It writes the length that it had in both places.
        edit(folder / "sentence_bert_config.json", max_seq_length=None)
        shutil.copy(backbone / "tokenizer_config.json", folder)
    return folder


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def assert_embedder_equals(folder: Path, texts: Sequence[str]) -> Embedder:
    """``Embedder`` gives the same embeddings as sentence-transformers, also after it wrote the folder itself."""
    expected = SentenceTransformer(str(folder), device="cpu").encode(list(texts))
    embedder = Embedder.load(folder, device="cpu")
    assert np.abs(embedder.encode(texts) - expected).max() <= 1e-5
    saved = folder.with_name(folder.name + "_saved")
    embedder.save_sentence_transformers(saved)
    assert np.abs(SentenceTransformer(str(saved), device="cpu").encode(list(texts)) - expected).max() <= 1e-5
    return embedder
