"""Several vectors per text: the head, MaxSim search, and ``Embedder``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig as TheirConfig
from transformers import BertModel as TheirModel
from transformers import BertTokenizerFast

from vembed_fs2 import Embedder, EncoderBatch
from vembed_fs2.embedding.head import validate_head
from vembed_fs2.embedding.inputs import ImageInputs, TextInputs
from vembed_fs2.embedding.model import DenseConfig, HeadConfig
from vembed_fs2.errors import ConfigError, DataError, VembedError
from vembed_fs2.evaluation import EmbeddingValueError, evaluate_retrieval, exact_search, relevant_ranks
from vembed_fs2.evaluation.search import maxsim_scores, pad_vectors
from vembed_fs2.files import write_json
from vembed_fs2.formats.folder import HEAD_FILE
from vembed_fs2.models.bert import BertConfig, create_bert_model

torch.set_num_threads(1)


# Search


def naive(queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
    """MaxSim in float64, one pair of texts at a time."""
    scores = torch.zeros(len(queries), len(documents), dtype=torch.float64)
    for i, query in enumerate(queries.double()):
        for j, document in enumerate(documents.double()):
            x, y = query[query_mask[i]], document[document_mask[j]]
            if len(x) and len(y):
                scores[i, j] = torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=2).max(1).values.sum()
    return scores


@st.composite
def cases(draw: st.DrawFn, *, exact: bool) -> dict[str, Any]:
    """Texts of up to five vectors, some without any.

    :param exact: whether all cosines are whole quarters, so that sums are exact, and ties are frequent.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_queries, num_documents, dim = draw(st.integers(1, 6)), draw(st.integers(1, 17)), draw(st.integers(4, 6))

    def texts(rows: int) -> tuple[Tensor, Tensor]:
        width = draw(st.integers(1, 5))
        mask = torch.rand(rows, width, generator=generator) < draw(st.sampled_from([0.3, 0.8, 1.0]))
        if not exact:
            return torch.randn(rows, width, dim, generator=generator), mask
        vectors = torch.zeros(rows * width, dim)
        for vector in vectors:
            kind = int(torch.randint(0, 3, (1,), generator=generator))  # No, one or four values that are not zero.
            where = torch.randperm(dim, generator=generator)[: (0, 1, 4)[kind]]
            signs = torch.randint(0, 2, (len(where),), generator=generator) * 2.0 - 1.0
            vector[where] = signs * 2.0 ** int(torch.randint(-3, 4, (1,), generator=generator))
        return vectors.view(rows, width, dim), mask

    (queries, query_mask), (documents, document_mask) = texts(num_queries), texts(num_documents)
    return {
        "queries": queries,
        "documents": documents,
        "query_mask": query_mask,
        "document_mask": document_mask,
        "query_block": draw(st.integers(1, 20)),
        "document_block": draw(st.integers(1, 40)),
    }


def order_of(scores: Tensor, left_out: int) -> list[int]:
    return sorted((d for d in range(len(scores)) if d != left_out), key=lambda d: (-scores[d].item(), d))


def naive_of(case: dict[str, Any]) -> Tensor:
    return naive(case["queries"], case["documents"], case["query_mask"], case["document_mask"])


@settings(max_examples=60)
@given(cases(exact=False))
def test_scores_equal_the_definition(case: dict[str, Any]) -> None:
    torch.testing.assert_close(maxsim_scores(**case).double(), naive_of(case), rtol=1e-5, atol=1e-5)


@settings(max_examples=100)
@given(cases(exact=True), st.integers(1, 20), st.booleans())
def test_search_equals_sorting_the_full_matrix(case: dict[str, Any], k: int, excludes: bool) -> None:
    scores = naive_of(case)
    num_queries, num_documents = scores.shape
    exclude = torch.arange(num_queries) % num_documents if excludes else None
    found = exact_search(k=k, similarity="maxsim", exclude=exclude, **case)
    for i in range(num_queries):
        order = order_of(scores[i], -1 if exclude is None else int(exclude[i]))[:k]
        missing = min(k, num_documents) - len(order)
        assert found.indices[i].tolist() == order + [-1] * missing
        assert found.scores[i].tolist() == [scores[i, d].item() for d in order] + [-torch.inf] * missing


@settings(max_examples=100)
@given(cases(exact=True), st.booleans())
def test_ranks_equal_positions_in_the_full_order(case: dict[str, Any], excludes: bool) -> None:
    scores = naive_of(case)
    num_queries, num_documents = scores.shape
    exclude = torch.full((num_queries,), num_documents - 1) if excludes else None
    relevant = torch.arange(num_documents - excludes).repeat(num_queries, 1)
    ranks = relevant_ranks(relevant=relevant, similarity="maxsim", exclude=exclude, **case)
    for i in range(num_queries):
        order = order_of(scores[i], num_documents - 1 if excludes else -1)
        assert ranks[i].tolist() == [order.index(d) + 1 for d in relevant[i].tolist()]


def test_one_vector_per_text_is_compared_by_cosine() -> None:
    queries, documents = torch.randn(9, 8), torch.randn(40, 8)
    relevant = [{i: 1.0, i + 9: 1.0} for i in range(9)]
    expected = evaluate_retrieval(queries, documents, relevant)
    assert evaluate_retrieval(queries[:, None], documents[:, None], relevant, similarity="maxsim") == expected


@settings(max_examples=60)
@given(cases(exact=True), st.integers(0, 2**31))
def test_metrics_are_those_of_the_full_order(case: dict[str, Any], seed: int) -> None:
    scores = naive_of(case)
    num_queries, num_documents = scores.shape
    generator = torch.Generator().manual_seed(seed)
    # Every second query has no relevant document, and takes no part.
    chosen = torch.randint(0, num_documents, (num_queries,), generator=generator).tolist()
    relevant = [{document: 1.0} if i % 2 == 0 else {} for i, document in enumerate(chosen)]
    found = evaluate_retrieval(corpus=case.pop("documents"), relevant=relevant, similarity="maxsim", **case)
    ranks = [order_of(scores[i], -1).index(chosen[i]) + 1 for i in range(0, num_queries, 2)]
    assert found["num_queries"] == len(ranks)
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
    assert found["recall@5"] == pytest.approx(sum(rank <= 5 for rank in ranks) / len(ranks))


def test_what_is_masked_may_be_anything_and_what_is_not_must_be_finite() -> None:
    vectors, mask = torch.randn(7, 3, 4), torch.ones(7, 3, dtype=torch.bool)
    vectors[5, 2, 1], mask[5, 2] = torch.nan, False
    scores = maxsim_scores(vectors, vectors, mask, mask)
    torch.testing.assert_close(scores.double(), naive(vectors, vectors, mask, mask), rtol=1e-5, atol=1e-5)
    with pytest.raises(EmbeddingValueError, match="document 5 holds NaN"):
        maxsim_scores(vectors, vectors, mask, document_block=6)
    with pytest.raises(EmbeddingValueError, match="query 5 holds NaN"):
        exact_search(vectors, vectors, 2, similarity="maxsim", document_mask=mask)


def test_wrong_shapes_are_errors() -> None:
    x, mask = torch.randn(3, 2, 4), torch.ones(3, 2, dtype=torch.bool)
    bad: list[tuple[str, Any]] = [
        (r"\[rows, vectors, dimensions\]", lambda: exact_search(x[:, 0], x, 1, similarity="maxsim")),
        (r"\[rows, vectors, dimensions\]", lambda: maxsim_scores(x, x[..., :3])),
        ("must be matrices", lambda: exact_search(x, x, 1)),
        ("at least one value", lambda: maxsim_scores(x, x[:, :0])),
        (r"`query_mask` .* of shape \(3, 2\)", lambda: maxsim_scores(x, x, mask[:, :1])),
        ("`document_mask` .* torch.float32", lambda: maxsim_scores(x, x, mask, mask.float())),
        ("only for 'maxsim'", lambda: exact_search(x[:, 0], x[:, 0], 1, query_mask=mask)),
        ("must be a matrix", lambda: pad_vectors([x[0], x[1, :, :3]])),
    ]
    for message, call in bad:
        with pytest.raises(ValueError, match=message):
            call()


# The head

TINY = {
    "model_dim": 8, "max_seq_len": 16, "vocab_size": 20, "num_layers": 1, "num_attn_heads": 2, "ffn_inner_dim": 8
}  # fmt: skip


def test_each_token_has_a_vector_that_the_dense_layers_project() -> None:
    dense = [DenseConfig(input_dim=8, output_dim=5, activation="tanh"), DenseConfig(input_dim=5, output_dim=3)]
    model = create_bert_model(BertConfig(**TINY, head=HeadConfig(pooling="none", dense=dense))).eval()
    ids = torch.randint(1, 20, (2, 6))
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    pooling = mask & (torch.arange(6) >= 2)
    found = model(EncoderBatch.of_text(ids, mask, pooling_mask=pooling))
    states = model.encode_tokens(EncoderBatch.of_text(ids, mask))
    expected = model.head.dense[1](torch.tanh(model.head.dense[0](states)))
    assert (model.similarity, model.embedding_dim) == ("maxsim", 3)
    torch.testing.assert_close(found.values, expected)
    assert torch.equal(found.mask, pooling)  # Without the prompt's tokens, as for the mean.
    assert torch.equal(model(EncoderBatch.of_text(ids, mask)).mask, mask)
    assert model(EncoderBatch.of_text(ids)).mask.all()
    alone = model(EncoderBatch.of_text(ids[1:, :4]))
    torch.testing.assert_close(alone.values[0], expected[1, :4], rtol=1e-5, atol=1e-6)


def test_rows_of_several_parts_are_errors() -> None:
    model = create_bert_model(BertConfig(**TINY, head=HeadConfig(pooling="none"))).eval()
    ids = torch.randint(1, 20, (2, 6))
    two_texts = EncoderBatch(1, TextInputs(ids, torch.tensor([0, 0])))
    with_image = EncoderBatch.of_text(ids)
    with_image.images = ImageInputs(torch.zeros(2, 3, 4, 4), torch.arange(2))
    for batch in (two_texts, with_image, EncoderBatch.of_images(torch.zeros(2, 3, 4, 4))):
        with pytest.raises(DataError, match="must be one text, and no image"):
            model(batch)


def test_only_models_that_give_a_mask_have_vectors_of_tokens() -> None:
    assert validate_head(HeadConfig(pooling="none"), 8, multi_vector=True) == []
    assert "must not be 'none'" in validate_head(HeadConfig(pooling="none"), 8)[0]
    with pytest.raises(ConfigError, match="must be one of cls, mean, pooler, last, max, none"):
        create_bert_model(BertConfig(**TINY, head=HeadConfig(pooling="some")))  # type: ignore[arg-type]


# Embedder

WORDS = ["red", "green", "blue", "black", "white", "small", "large", "old", "new", "round", "square", "heavy", "light"]

TEXTS = ["red", "", "green blue black white small large old new", "old new round", "heavy light " * 5, "x"] * 2


def write_folder(folder: Path, head: HeadConfig) -> Path:
    """A folder in transformers' layout of a tiny BERT."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.mkdir()
    folder.joinpath("vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    config = TheirConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    TheirModel(config).save_pretrained(folder)
    write_json(folder / HEAD_FILE, {"pooling": head.pooling, "normalize": head.normalize})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("bert") / "model", HeadConfig(pooling="none"))


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Embedder:
    return Embedder.load(folder, device="cpu")


def theirs(folder: Path, text: str) -> Any:
    """The last states of transformers' model, of unit length."""
    tokenizer, model = BertTokenizerFast.from_pretrained(folder), TheirModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return torch.nn.functional.normalize(states, dim=1).numpy()


def assert_same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert [f.shape for f in found] == [e.shape for e in expected]
    for f, e in zip(found, expected):
        np.testing.assert_allclose(f, e, rtol=tolerance, atol=tolerance)


def test_vectors_equal_transformers_in_input_order(
    embedder: Embedder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [theirs(folder, text) for text in TEXTS]
    found = embedder.encode(TEXTS)
    assert isinstance(found, list)
    assert {f.dtype for f in found} == {np.dtype(np.float32)}
    assert_same(found, expected)
    assert_same(embedder.encode(TEXTS, batch_size=1), expected)
    monkeypatch.setattr("vembed_fs2.inference.prepare.WINDOW_ROWS", 5)
    assert_same(embedder.encode(TEXTS), expected)
    assert_same(list(embedder.encode_stream(iter(TEXTS))), expected)


def test_one_input_gives_a_matrix_and_none_give_an_empty_list(embedder: Embedder) -> None:
    assert embedder.encode("red green").shape == (4, 16)
    assert embedder.encode([]) == []
    assert list(embedder.encode_stream([])) == []


def test_options_apply_to_each_vector(embedder: Embedder) -> None:
    raw = embedder.encode(TEXTS, normalize_embeddings=False)
    unit = embedder.encode(TEXTS)
    assert_same(unit, [v / np.linalg.norm(v, axis=1, keepdims=True) for v in raw])
    cut = [v[:, :5] for v in raw]
    assert_same(embedder.encode(TEXTS, truncate_dim=5, normalize_embeddings=False), cut)
    expected = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in cut]
    assert_same(list(embedder.encode_stream(TEXTS, truncate_dim=5)), expected)
    tensors = embedder.encode(TEXTS, convert_to_tensor=True)
    assert all(isinstance(t, Tensor) and not t.is_inference() for t in tensors)
    assert_same([t.numpy() for t in tensors], unit, 0.0)
    assert embedder.encode("red", convert_to_tensor=True).shape == (3, 16)
    for precision in ("int8", "ubinary"):
        with pytest.raises(VembedError, match="of a multi-vector model must be float32"):
            embedder.encode(TEXTS, precision=precision)  # type: ignore[arg-type]


def test_tokens_of_prompts_have_no_vectors_where_the_model_says_so(folder: Path) -> None:
    model = Embedder.load(folder, device="cpu")
    with_prompt = model.encode(["round square"], prompt="old new ")
    model.processor.settings.include_prompt = False
    (found,) = model.encode(["round square"], prompt="old new ")
    assert_same([found], [with_prompt[0][3:]])  # As for the mean, [CLS] goes with the prompt.


def test_similarity_is_maxsim(embedder: Embedder) -> None:
    a, b = embedder.encode(TEXTS[:4], normalize_embeddings=False), embedder.encode(TEXTS[2:8])
    (x, x_mask), (y, y_mask) = (pad_vectors([torch.from_numpy(v) for v in vectors]) for vectors in (a, b))
    expected = naive(x, y, x_mask, y_mask).float().numpy()
    assert_same(embedder.similarity(a, b), expected)
    assert_same(embedder.similarity(b, a), naive(y, x, y_mask, x_mask).float().numpy())
    assert_same(embedder.similarity_pairwise(a, b[:4]), expected.diagonal())
    assert_same([embedder.similarity(a[1], b)], [expected[1]])
    assert_same([embedder.similarity(a, b[2])], [expected[:, 2]])
    assert_same([embedder.similarity(a[1], b[2])], [expected[1, 2]])
    assert_same([embedder.similarity_pairwise(a[1], b[2])], [expected[1, 2]])
    assert isinstance(embedder.similarity([torch.from_numpy(v) for v in a], b), Tensor)
    assert isinstance(embedder.similarity(a, [torch.from_numpy(v) for v in b]), np.ndarray)
    assert embedder.similarity([], b).shape == (0, 6)
    assert embedder.similarity_pairwise([], []).shape == (0,)
    with pytest.raises(VembedError, match="as many, but are 4 and 6"):
        embedder.similarity_pairwise(a, b)


def test_exports_keep_the_vectors_or_are_refused(embedder: Embedder, tmp_path: Path) -> None:
    embedder.save_hf(tmp_path / "hf")
    again = Embedder.load(tmp_path / "hf", device="cpu")
    assert again.model.similarity == "maxsim"
    assert_same(again.encode(TEXTS), embedder.encode(TEXTS), 0.0)
    with pytest.raises(VembedError, match="'none', which sentence-transformers does not have"):
        embedder.save_sentence_transformers(tmp_path / "st")
    assert not (tmp_path / "st").exists()
