"""Layers against the reference implementations in transformers, and their slices for tensor parallelism."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from ramet.model_runner.layers.embedding import VocabMatrix
from ramet.model_runner.layers.linear import ColumnParallelLinear, RowParallelLinear, can_pack, linear, pack
from ramet.model_runner.layers.mlp import activation
from ramet.model_runner.layers.moe import MoE, MoESpec
from ramet.model_runner.layers.norm import QKNorm, RMSNorm
from ramet.model_runner.layers.rope import rope_frequencies, rotate
from ramet.model_runner.parallel import TpGroup
from ramet.model_runner.weights.errors import WeightsError

ALONE = TpGroup()
LONG_FACTORS = {"long_factor": [2.0 + i for i in range(8)], "short_factor": [1.0] * 8}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("reference", "offset"), [(LlamaRMSNorm, 0.0), (Gemma3RMSNorm, 1.0)])
def test_rms_norm(dtype: torch.dtype, reference: type, offset: float) -> None:
    theirs = reference(48, eps=1e-5).to(dtype)
    theirs.weight.data.normal_()
    ours = RMSNorm(48, 1e-5, dtype, offset)
    ours.weight.data.copy_(theirs.weight.float() + offset)
    hidden = torch.randn(5, 48).to(dtype) * 3
    torch.testing.assert_close(ours(hidden), theirs(hidden))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_qk_norm_treats_queries_and_keys_apart(offset: float) -> None:
    norm = QKNorm(2, 1, 8, 1e-6, offset)
    q_part, k_part = norm.weight_parts("x.")
    q_weight, k_weight = torch.randn(8), torch.randn(8)
    q_part.target.copy_(q_weight)
    k_part.target.copy_(k_weight)
    assert (q_part.name, k_part.name, q_part.offset) == ("x.q_norm.weight", "x.k_norm.weight", offset)
    heads = torch.randn(4, 3, 8)
    expected = torch.cat([F.rms_norm(heads[:, :2], (8,), q_weight), F.rms_norm(heads[:, 2:], (8,), k_weight)], dim=1)
    torch.testing.assert_close(norm(heads), expected)


@pytest.mark.parametrize(
    ("parameters", "context_length"),
    [
        ({"rope_type": "default"}, 300),
        ({"rope_type": "linear", "factor": 4.0}, 300),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            300,
        ),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 300),
        ({"rope_type": "dynamic", "factor": 2.0}, 300),  # within the trained context: plain
        ({"rope_type": "dynamic", "factor": 2.0}, 700),
        ({"rope_type": "longrope", "original_max_position_embeddings": 256, **LONG_FACTORS}, 250),
        ({"rope_type": "longrope", "original_max_position_embeddings": 256, **LONG_FACTORS}, 300),
    ],
)
def test_rope_equals_transformers_at_full_context(parameters: dict[str, Any], context_length: int) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 10000.0, **parameters},
    )
    positions = torch.arange(context_length)
    query = torch.randn(context_length, 3, 16)
    cos, sin = LlamaRotaryEmbedding(config)(query, positions[None])
    expected, _ = apply_rotary_pos_emb(query.transpose(0, 1)[None], query.transpose(0, 1)[None], cos, sin)
    frequencies = rope_frequencies(config, context_length)
    with torch.device("meta"):  # models are built under the device of their parameters
        table = frequencies.table(context_length, torch.device("cpu"))
    found = rotate(query, table[:, :1], table[:, 1:])
    torch.testing.assert_close(found, expected[0].transpose(0, 1), atol=1e-4, rtol=1e-5)


def test_unknown_rope_and_activation_are_refused() -> None:
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4)
    config.rope_parameters = {"rope_type": "su", "rope_theta": 10000.0}
    with pytest.raises(WeightsError, match="'su' is not supported"):
        rope_frequencies(config, 64)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    with pytest.raises(WeightsError, match=r"partial_rotary_factor 0\.5 is not supported"):
        rope_frequencies(config, 64)
    with pytest.raises(WeightsError, match="'relu6' is not supported"):
        activation("relu6")


@pytest.mark.parametrize("normalize", [True, False])
def test_moe_equals_transformers(normalize: bool) -> None:
    config = transformers.Qwen3MoeConfig(
        hidden_size=32,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=normalize,
        num_attention_heads=4,
        head_dim=8,
    )
    theirs = Qwen3MoeSparseMoeBlock(config)
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.3)
    ours = MoE(32, MoESpec(6, 3, 24, normalize), "silu", ALONE, torch.float32)
    ours.router.data.copy_(theirs.gate.weight)
    ours.gate_up.data.copy_(theirs.experts.gate_up_proj)
    ours.down.data.copy_(theirs.experts.down_proj)
    for tokens in (1, 2, 17):
        hidden = torch.randn(tokens, 32)
        torch.testing.assert_close(ours(hidden), theirs(hidden[None])[0])


def test_rank_slices_put_together_are_the_whole() -> None:
    """Fill each rank of two as the loader does, from the slices that the parts name."""
    outputs = {"q_proj": 16, "k_proj": 8}
    tensors = {"q_proj.weight": torch.randn(16, 12), "k_proj.weight": torch.randn(8, 12)}
    tensors |= {"q_proj.bias": torch.randn(16), "k_proj.bias": torch.randn(8)}
    tensors |= {"out.weight": torch.randn(12, 16), "embed.weight": torch.randn(10, 12)}
    hidden, attended = torch.randn(3, 12), torch.randn(3, 16)
    columns, rows = [], []
    embeddings: list[torch.Tensor] = []
    for rank in range(2):
        group = TpGroup(rank, 2)
        column = ColumnParallelLinear(12, outputs, group, torch.float32, bias=True, unit=4)
        row = RowParallelLinear(16, 12, group, torch.float32, unit=4)
        vocab = VocabMatrix(10, 12, group, torch.float32)
        for part in (*column.weight_parts(""), *row.weight_parts("out"), *vocab.weight_parts("embed")):
            assert tuple(tensors[part.name].shape) == part.shape
            part.target.copy_(tensors[part.name][part.index])
        columns.append(column(hidden).split([8, 4], dim=-1))
        rows.append(F.linear(attended[:, rank * 8 : rank * 8 + 8], row.weight))
        embeddings.append(vocab.weight)
    for index, name in enumerate(outputs):
        whole = F.linear(hidden, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
        torch.testing.assert_close(torch.cat([columns[0][index], columns[1][index]], dim=-1), whole)
    torch.testing.assert_close(rows[0] + rows[1], F.linear(attended, tensors["out.weight"]))
    assert torch.equal(torch.cat(embeddings), tensors["embed.weight"])


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k_proj blocks of 4 features \(3\) cannot be divided over 2"):
        ColumnParallelLinear(12, {"k_proj": 12}, TpGroup(0, 2), torch.float32, unit=4)


def test_a_row_of_a_product_has_the_same_bits_in_any_company_packed_or_not():
    weight = torch.randn(576, 1536, generator=torch.Generator().manual_seed(1)).bfloat16()
    if not can_pack(weight):
        pytest.skip("no bfloat16 products by oneDNN on this CPU")
    hidden = torch.randn(70, 1536, generator=torch.Generator().manual_seed(2)).bfloat16()
    bias = torch.randn(576, generator=torch.Generator().manual_seed(3)).bfloat16()
    packed, plain = pack(weight), linear(hidden, weight, bias)
    torch.testing.assert_close(linear(hidden, packed, bias), plain, rtol=1e-2, atol=1e-2)
    together = linear(hidden, packed, bias)
    for rows in (1, 2, 3, 4, 5, 9, 17, 33):
        for first in range(0, 70 - rows, 3):
            some = slice(first, first + rows)
            assert torch.equal(linear(hidden[some], packed, bias), together[some])
            assert torch.equal(linear(hidden[some], weight, bias), plain[some])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_row_of_a_float32_product_has_the_same_bits_in_any_company(threads):
    weight, bias = torch.randn(96, 128, generator=torch.Generator().manual_seed(1)), torch.ones(96)
    hidden = torch.randn(60, 128, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = linear(hidden, weight, bias)
        for rows in (*range(1, 22), 33, 50):
            for first in (0, 3, 60 - rows):
                some = slice(first, first + rows)
                assert torch.equal(linear(hidden[some], weight, bias), together[some]), rows
    finally:
        torch.set_num_threads(before)


def test_float32_is_not_packed():
    assert not can_pack(torch.zeros(8, 8))


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_a_row_of_an_activation_has_the_same_bits_in_any_company(name):
    function, plain = activation(name), {"silu": F.silu, "gelu": F.gelu}.get(name, partial(F.gelu, approximate="tanh"))
    wide = torch.randn(460, 192, generator=torch.Generator().manual_seed(1)) * 2
    gate, _ = wide.chunk(2, dim=-1)  # as in a gated MLP
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = plain(gate.contiguous())
    torch.set_num_threads(2)
    try:
        for rows in (1, 5, 341, 342, 397, 401, 445):
            assert torch.equal(function(gate[:rows]), expected[:rows]), rows
    finally:
        torch.set_num_threads(before)
