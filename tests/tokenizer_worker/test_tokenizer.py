"""Every way of spelling tokens gives back the text's own bytes."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ramet.tokenizer_worker.tokenizer import Tokenizer, TokenizerError

TEXT = "Hello, wörld! 日本語 👩‍🚀 tabs\tand\n\nlines  123"


def test_byte_level_tokens_give_the_texts_bytes(tiny_model):
    tokenizer = Tokenizer(str(tiny_model("llama")))
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == TEXT
    assert len(ids) > len(TEXT), "some characters are split over tokens"


def test_special_tokens_are_known_and_spell_their_name(tiny_model):
    tokenizer = Tokenizer(str(tiny_model("llama")))
    (end,) = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    assert end in tokenizer.special_ids
    assert tokenizer.token_bytes(end) == b"<|im_end|>"


def test_id_beyond_the_vocabulary_is_no_text(tiny_model):
    tokenizer = Tokenizer(str(tiny_model("llama")))
    assert tokenizer.token_bytes(10**6) == b""


def test_sentencepiece_spelling_with_byte_fallback(tmp_path):
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"▁Hi": 256, "▁the": 257, "re": 258, "▁": 259, "<unk>": 260}
    raw = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(str(tmp_path))
    ids = [256, 257, 258, 259, *"é".encode()]
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == " Hi there é"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hi there é"


def test_metaspace_spelling(tmp_path):
    raw = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -1.0)], 0))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(str(tmp_path))
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("ab a", False)] == [b" a", b"b", b" a"]


def test_word_piece_spelling(tmp_path):
    raw = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "eat": 1, "##ing": 2, "bread": 3}))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(str(tmp_path))
    ids = tokenizer.encode("eating bread", False)
    assert [tokenizer.token_bytes(i) for i in ids] == [b" eat", b"ing", b" bread"]


@pytest.mark.parametrize("content", [None, "{}", json.dumps({"model": {"type": "?"}})])
def test_unusable_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer(str(tmp_path))
