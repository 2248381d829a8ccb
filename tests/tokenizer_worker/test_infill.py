"""Fill-in-the-middle prompts, in the tokens of each family of code models."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from ramet.ipc.errors import RequestError
from ramet.ipc.messages import Completion, Generate, Job
from ramet.ipc.sampling import SamplingParams
from ramet.tokenizer_worker.config import TokenizerConfig
from ramet.tokenizer_worker.worker import Encoder


def encoder(folder: Path) -> Encoder:
    return Encoder(TokenizerConfig(tokenizer_dir=str(folder), context_length=64, vocab_size=1000))


def between(folder: Path, before: str, after: str, **params: object) -> Generate:
    job = Job(["r"], SamplingParams(**params))
    (request,) = encoder(folder).encode(Completion(job, before, after))
    return request


def with_tokens(source: Path, target: Path, *spellings: str) -> tokenizers.Tokenizer:
    """The tokenizer of `source` with special tokens added, in `target`."""
    tokenizer = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(spelling, special=True) for spelling in spellings])
    tokenizer.save(str(target / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize(
    "marks",
    [
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ],
)
def test_families(tiny_model, tmp_path: Path, marks: tuple[str, str, str]) -> None:
    tokenizer = with_tokens(tiny_model("llama"), tmp_path, *marks, "<|file_sep|>")
    first, second, third, sep = (tokenizer.token_to_id(spelling) for spelling in (*marks, "<|file_sep|>"))
    request = between(tmp_path, "def f(", "):\n", stop_token_ids=(7,))
    before, after = tokenizer.encode("def f(").ids, tokenizer.encode("):\n").ids
    assert request.prompt_ids == [first, *before, second, *after, third]
    ends = {7, first, second, third, sep, tokenizer.token_to_id("<|endoftext|>")}
    assert set(request.params.stop_token_ids) == ends
    assert between(tmp_path, "", "z", ignore_eos=True).params.stop_token_ids == ()


def test_code_llama_puts_no_space_before_the_suffix(tmp_path: Path) -> None:
    """And its BOS token comes before everything."""
    words = ["<unk>", "<s>", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "▁", "a", "b", "▁a", "▁b"]
    vocab = {word: i for i, word in enumerate(words)} | {f"<0x{i:02X}>": 100 + i for i in range(256)}
    raw = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    raw.add_special_tokens(["<s>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    request = between(tmp_path, "ab", "ba b")
    spelled = [words[i] for i in request.prompt_ids]
    assert spelled == ["<s>", "▁<PRE>", "▁a", "b", "▁<SUF>", "b", "a", "▁b", "▁<MID>"]
    assert words.index("▁<EOT>") in request.params.stop_token_ids


def test_a_model_without_such_tokens(tiny_model) -> None:
    with pytest.raises(RequestError, match="no fill-in-the-middle tokens") as caught:
        between(tiny_model("llama"), "a", "z")
    assert (caught.value.failure.param, caught.value.failure.code) == ("suffix", "unsupported_parameter")


def test_more_text_than_is_encoded(tiny_model, tmp_path: Path) -> None:
    with_tokens(tiny_model("llama"), tmp_path, "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    with pytest.raises(RequestError, match="the prompt has 9000 characters, at most 8192 are tokenized here"):
        between(tmp_path, "x" * 4000, "y" * 5000)
