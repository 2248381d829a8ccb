"""Writes a tiny Hugging Face model as a GGUF file, with llama.cpp's names and changes to the tensors."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

QUANT = gguf.GGMLQuantizationType

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(
    folder: Path,
    arch: str,
    path: Path,
    quant: QUANT = QUANT.F32,
    extra: dict[str, np.ndarray] | None = None,
    others: Mapping[str, QUANT] | None = None,
) -> dict[str, np.ndarray]:
    """`arch` is GGUF's name. Matrices are stored as `quant`, but for `others` (by Hugging Face names). Returns the
    weights as the file gives them back, under these names, so that a test can compare without trusting the reader."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_token_list([f"t{i}é" for i in range(config["vocab_size"])])
    writer.add_token_scores([0.5] * config["vocab_size"])
    stored_back: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    tensors = load_file(folder / "model.safetensors")
    for name in sorted(tensors, key=_natural):
        tensor, kind = tensors[name], QUANT.F32 if tensors[name].ndim < 2 else (others or {}).get(name, quant)
        stored_back[name] = gguf.dequantize(gguf.quantize(tensor, kind), kind).reshape(tensor.shape)
        if arch == "llama" and (heads := re.search(r"\.([qk])_proj", name)):
            count = config["num_attention_heads" if heads[1] == "q" else "num_key_value_heads"]
            # Rows of a head go from halves to pairs, as llama.cpp's rope for this architecture wants them.
            tensor = tensor.reshape(count, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        if arch == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        if ".experts." in name:
            stacks.setdefault(_gguf_name(name, arch), []).append(gguf.quantize(tensor, kind))
        else:
            writer.add_tensor(_gguf_name(name, arch), gguf.quantize(tensor, kind), raw_dtype=kind)
    for name, experts in stacks.items():
        writer.add_tensor(name, np.stack(experts), raw_dtype=quant)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored_back


def _gguf_name(name: str, arch: str) -> str:
    names = _NAMES | (_GEMMA_NAMES if arch == "gemma3" else {})
    stem, _, suffix = re.sub(r"\.experts\.\d+\.", ".experts.", name).rpartition(".")
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
        return f"blk.{layer[1]}.{names[layer[2]]}.{suffix}"
    return f"{names[stem]}.{suffix}"


def _natural(name: str) -> list[int | str]:
    """Expert 10 after expert 9."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]
