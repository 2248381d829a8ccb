"""Makes tiny model folders with random weights (float32, seeded) and a real byte-level BPE tokenizer.

Weights are scaled so that each token matters: greedy decoding wanders instead of repeating one token. Needs no hub.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

EOS, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXT = [
    "The quick brown fox jumps over the lazy dog while the rain falls on the plain.",
    "A language model reads tokens one after the other and guesses which one comes next.",
    "Paris is the capital of France, Berlin is the capital of Germany, and Rome is the capital of Italy.",
    "The user asks a question, the assistant gives an answer, and the system keeps them both in order.",
    "Numbers such as 1, 2, 3, 10, 100 and 1024 are written with digits; words are written with letters.",
    'def main(): print("hello, world") return {"a": [1, 2, 3], "b": null, "c": true}',
]

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GEMMA3 = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000000.0},
    },
}
_MOE = {
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
_GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 2048}

# Name of the tiny model: (transformers config class, its settings).
_CONFIGS: dict[str, tuple[type[transformers.PretrainedConfig], dict]] = {
    "llama": (transformers.LlamaConfig, _COMMON | {"tie_word_embeddings": False}),
    "llama3_rope": (
        transformers.LlamaConfig,
        _COMMON | {"tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE, "head_dim": 32},
    ),
    "mistral": (transformers.MistralConfig, _COMMON | {"sliding_window": 24}),
    "qwen2": (
        transformers.Qwen2Config,
        _COMMON | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, _COMMON | {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, _COMMON | _MOE),
    "gemma3": (transformers.Gemma3TextConfig, _COMMON | _GEMMA3),
    "gpt2": (transformers.GPT2Config, _GPT2),
    "olmo2": (transformers.Olmo2Config, _COMMON),
}

TINY_ARCHITECTURES = tuple(_CONFIGS)
NATIVE_ARCHITECTURES = tuple(name for name in _CONFIGS if name not in ("gpt2", "olmo2"))


def make_tiny_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """Write tokenizer.json and tokenizer_config.json (with a ChatML template); at most 512 tokens."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[EOS, IM_START, IM_END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=IM_END,
        pad_token=EOS,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.save_pretrained(folder)
    # One file, as most published folders have it.
    template = folder / "chat_template.jinja"
    if template.exists():
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template.read_text()}))
        template.unlink()
    return tokenizer


def make_tiny_model(arch: str, folder: Path, **changes: Any) -> Path:
    """Write a model of `TINY_ARCHITECTURES` with tokenizer and configs into `folder` (made if absent).

    `changes` replace settings of its config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(folder)
    config_class, settings = _CONFIGS[arch]
    eos_ids = [tokenizer.convert_tokens_to_ids(IM_END), tokenizer.convert_tokens_to_ids(EOS)]
    tokens = {"eos_token_id": eos_ids, "pad_token_id": eos_ids[1], "bos_token_id": None}
    config = config_class(**({"vocab_size": len(tokenizer)} | tokens | settings | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomize(model)
    model.generation_config = transformers.GenerationConfig(**tokens)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Weights that keep activations of order one, and logits spread over several units."""
    tied = model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if "embed" in name or "wte" in name or "wpe" in name:
            parameter.copy_((0.1 if tied else 1.0) * noise)
        elif parameter.dim() >= 2:
            gain = 3.0 if "lm_head" in name else 1.3
            parameter.copy_(noise * gain * min(parameter.shape[-2:]) ** -0.5)
        elif tied and name in ("model.norm.weight", "transformer.ln_f.weight"):
            # Signs at random: else a head that is the embedding echoes its input.
            parameter.copy_(4.0 * noise)
        elif "q_norm" in name:
            parameter.add_(1.5 + 0.1 * noise)  # sharper attention: a mean over all tokens says little of any
        else:
            parameter.add_(0.1 * noise)  # around 1 or 0: whatever a norm or a bias starts from


def replace_rarest_tokens(folder: Path, *names: str, special: bool) -> None:
    """Added tokens with these names in place of those that were merged last."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for name in names:
        left, right = tokenizer["model"]["merges"].pop()
        number = tokenizer["model"]["vocab"].pop(left + right)
        tokenizer["model"]["vocab"][name] = number
        added = {**tokenizer["added_tokens"][0], "id": number, "content": name, "special": special}
        tokenizer["added_tokens"].append(added)
    path.write_text(json.dumps(tokenizer))
