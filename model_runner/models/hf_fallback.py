"""Any `AutoModelForCausalLM` architecture without a native file, through transformers' own modelling code.

Our paged attention is registered in transformers' attention interface, and no mask is built: each call goes to
`ForwardContext.attend`. The layers that attend are found by a recording forward when the model is loaded; then the
model's eager attention and ours are compared on a short prompt in two chunks, so that whatever state or term our
attention does not carry (ALiBi, sinks, recurrent layers, ignored positions) is refused instead of served wrongly.
The head is the model class's own: its forward runs with the decoder replaced by the hidden states it would return.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ramet.model_runner.attention.torch_backend import TorchBackend
from ramet.model_runner.config import LoadFormat, RunnerConfig
from ramet.model_runner.context import AttentionSpec, ForwardContext
from ramet.model_runner.kv_pool import KVPool, KVSpec
from ramet.model_runner.models.base import CausalLM
from ramet.model_runner.parallel import TpGroup
from ramet.model_runner.weights.errors import WeightsError
from ramet.model_runner.weights.mapping import Progress

_ATTENTION = "ramet_paged"
# Arguments of transformers' attention functions that add terms which paged attention does not have.
_TERMS = ("s_aux", "position_bias", "attn_bias", "alibi", "head_mask", "cu_seq_lens_q", "encoder_hidden_states")
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_CHECK_TOKENS, _CHECK_CHUNK = 24, 16


class _Bridge:
    """Joins the attention modules of one model to the step's context; each of them holds a reference to it."""

    def __init__(self) -> None:
        self.specs: dict[int, AttentionSpec] = {}  # by id of the attention module
        self.kv_specs: list[KVSpec] = []
        self.ctx: ForwardContext | None = None
        self.hidden: Tensor | None = None

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, terms: dict[str, Any]) -> Tensor:
        """query [1, heads, N, dim] -> [1, N, heads, value_dim]. Without a context: record and return zeros."""
        if self.ctx is None:
            self._record(module, query, key, value, terms)
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return self.ctx.attend(self.specs[id(module)], query, key, value)[None]

    def _record(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, terms: dict[str, Any]) -> None:
        name = type(module).__name__
        if id(module) in self.specs:
            raise WeightsError(f"{name} attends twice in one forward: not supported")
        if found := [term for term in _TERMS if terms.get(term) is not None]:
            raise WeightsError(f"{name} adds {', '.join(found)} to its attention: not supported")
        causal = terms.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            raise WeightsError(f"{name} does not attend causally: not supported")
        scale = terms.get("scaling")
        self.specs[id(module)] = AttentionSpec(
            layer=len(self.kv_specs),
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            sliding_window=terms.get("sliding_window"),
            softcap=terms.get("softcap"),
        )
        self.kv_specs.append(KVSpec(key.shape[1], key.shape[-1], value.shape[-1]))


def _paged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **terms: Any
) -> tuple[Tensor, None]:
    """The signature that transformers calls. `attention_mask` is None: our kind of attention has no mask function."""
    if attention_mask is not None:
        raise WeightsError(f"{type(module).__name__} brings an attention mask of its own: not supported")
    bridge: _Bridge = module.ramet_bridge  # type: ignore[assignment]
    return bridge.attend(module, query, key, value, terms), None


class FallbackLM(CausalLM):
    """Wraps a transformers model. One forward at a time: the bridge holds the context while it runs."""

    capturable = False  # nobody knows what is in it

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.decoder = model.get_decoder()
        self.bridge = _Bridge()
        for module in model.modules():
            module.ramet_bridge = self.bridge  # type: ignore[assignment]
        self._decode = self.decoder.forward
        self._output_class: type = BaseModelOutputWithPast  # what the decoder returns: known once it has run
        self.decoder.forward = self._decode_or_given
        self.kv_specs = self.bridge.kv_specs
        self.vocab_size = model.config.get_text_config().vocab_size

    def _decode_or_given(self, *args: Any, **kwargs: Any) -> Any:
        if self.bridge.hidden is not None:
            return self._output_class(last_hidden_state=self.bridge.hidden)
        output = self._decode(*args, **kwargs)
        self._output_class = type(output)
        return output

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        self.bridge.ctx = ctx
        try:
            return self.run_decoder(token_ids, ctx.positions)
        finally:
            self.bridge.ctx = None

    def run_decoder(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        output = self.decoder(input_ids=token_ids[None], position_ids=positions[None], use_cache=False)
        hidden: Tensor = output[0][0]
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        self.bridge.hidden = hidden[None]
        try:
            placeholder = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
            logits: Tensor = self.model(input_ids=placeholder, use_cache=False).logits
        finally:
            self.bridge.hidden = None
        return logits[0].float()


@torch.inference_mode()
def load_fallback(config: RunnerConfig, architecture: str, group: TpGroup, progress: Progress) -> FallbackLM:
    """Raises WeightsError if the checkpoint cannot be loaded, or not be run correctly with paged attention."""
    if group.size > 1:
        raise WeightsError(f"{architecture} runs through transformers, on one device only")
    try:
        return _load_checked(config, architecture, progress)
    except (WeightsError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # others' code, which may fail in any way where a config does not fit it
        words = f"transformers cannot load {architecture} from {config.weights}, or not run it"
        raise WeightsError(f"{words}: {type(error).__name__}: {error}") from error


def _load_checked(config: RunnerConfig, architecture: str, progress: Progress) -> FallbackLM:
    hf_config = transformers.AutoConfig.from_pretrained(config.model_dir, trust_remote_code=config.trust_remote_code)
    _check_config(hf_config, architecture, config.context_length)
    progress(0, 1)
    hf_model = _load(config, hf_config).eval()
    hf_model.to(torch.device(config.device))
    hf_model.config.pad_token_id = None  # some look for it in all that they are given, and so wait for the device
    progress(1, 1)
    reference, noise = _own_logits(hf_model)
    transformers.AttentionInterface.register(_ATTENTION, _paged_attention)
    hf_model.set_attn_implementation(_ATTENTION)
    model = FallbackLM(hf_model)
    _record_layers(model, config.context_length)
    _check_windows(model, config.context_length)
    _check_logits(model, reference, noise)
    return model


def _check_config(config: PretrainedConfig, architecture: str, context_length: int) -> None:
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not remote:
        raise WeightsError(f"{architecture} is not a causal language model that transformers knows")
    text = config.get_text_config()
    if odd := set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES:
        raise WeightsError(f"{architecture} has layers of kind {', '.join(sorted(odd))}: not supported")
    rope = getattr(text, "rope_parameters", None) or {}
    for kind in [rope] if "rope_type" in rope else [inner for inner in rope.values() if isinstance(inner, dict)]:
        # transformers changes these frequencies with the longest request of a step: wrong for the others beside it.
        keys = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}
        key = keys.get(kind.get("rope_type", "default"))
        limit = None if key is None else kind.get(key) or getattr(text, key, 0)
        if limit is not None and context_length > limit:
            raise WeightsError(
                f"{architecture} changes its rope ({kind['rope_type']}) beyond {limit} tokens, which requests in one "
                f"batch cannot share: the context length must be at most {limit}, got {context_length}"
            )


def _load(config: RunnerConfig, hf_config: PretrainedConfig) -> PreTrainedModel:
    common: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": "eager",
    }
    auto, weights = transformers.AutoModelForCausalLM, Path(config.weights)
    folder = weights.parent if weights.is_file() else weights
    if config.load_format is LoadFormat.DUMMY:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            dummy: PreTrainedModel = auto.from_config(hf_config, **common)
            return dummy
    if config.load_format is LoadFormat.GGUF:
        common["gguf_file"] = weights.name
    else:
        common["use_safetensors"] = config.load_format is LoadFormat.SAFETENSORS
    loaded: Any = auto.from_pretrained(folder, config=hf_config, output_loading_info=True, **common)
    model: PreTrainedModel
    model, info = loaded
    for what, keys in (("lacks", info["missing_keys"]), ("has unknown", info["unexpected_keys"])):
        if keys:
            raise WeightsError(f"the checkpoint {what} {', '.join(sorted(keys)[:8])}")
    return model


def _record_layers(model: FallbackLM, context_length: int) -> None:
    """Run the last two positions of the context without one, so that `kv_specs` fill and too long tables show."""
    name = type(model.model).__name__
    device = next(model.parameters()).device
    positions = torch.arange(max(context_length - 2, 0), context_length, device=device)
    tokens = _check_tokens(model.model)[: len(positions)]
    try:
        model.run_decoder(tokens, positions)
    except IndexError as error:
        raise WeightsError(f"{name} has no position {context_length - 1}: the context length is too long") from error
    except TypeError as error:
        raise WeightsError(f"{name} cannot be called with token positions: {error}") from error
    if not model.kv_specs:
        raise WeightsError(f"{name} does not use transformers' attention interface: not supported")


def _check_windows(model: FallbackLM, context_length: int) -> None:
    """A window that the model would apply by a mask, and does not tell our attention, would be lost."""
    config = model.model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is None or window >= context_length or getattr(config, "use_sliding_window", True) is False:
        return
    specs = list(model.bridge.specs.values())
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(specs)
    told = ["full_attention" if spec.sliding_window is None else "sliding_attention" for spec in specs]
    if told != list(kinds):
        raise WeightsError(
            f"{type(model.model).__name__} does not say which layers have its sliding window of {window} tokens: "
            f"the context length must be at most {window}, got {context_length}"
        )


def _check_tokens(model: PreTrainedModel) -> Tensor:
    vocab_size = model.config.get_text_config().vocab_size
    # Any spread of ids will do; 7919 is prime, so they do not repeat soon.
    return (torch.arange(1, _CHECK_TOKENS + 1) * 7919 % vocab_size).to(model.device)


def _own_logits(model: PreTrainedModel) -> tuple[Tensor, float]:
    """Logits [tokens, vocab] of the model's eager attention, and how far its other attention (sdpa) is from them.

    The latter is the rounding that this model shows in low precision; routers of experts may amplify it much.
    """
    tokens = _check_tokens(model)[None]

    def run() -> Tensor:
        logits: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        return logits[0].float()

    eager = run()
    if model.dtype == torch.float32:
        return eager, 0.0
    try:
        model.set_attn_implementation("sdpa")
    except (ValueError, ImportError):  # this class has none
        return eager, 0.0
    return eager, _difference(run(), eager)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative, of the median token: in low precision a router may send a few tokens elsewhere."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)).median().item()


def _check_logits(model: FallbackLM, reference: Tensor, noise: float) -> None:
    """Our logits of a prompt in two chunks must be those of one eager forward, up to the precision's rounding."""
    tokens = _check_tokens(model.model)
    dtype = model.model.dtype
    pool = KVPool(model.kv_specs, num_pages=2, page_size=_CHECK_CHUNK, dtype=dtype, device=tokens.device)
    # Measured in bfloat16: sound models stay below twice their noise, a scale wrong by a tenth gives four times it. A
    # deep mixture of experts with random weights can be refused wrongly; with tiny ones the check sees little.
    allowed = 1e-3 if dtype == torch.float32 else max(0.05, 3 * noise)
    for first, last in ((0, _CHECK_CHUNK), (_CHECK_CHUNK, _CHECK_TOKENS)):
        logits = model.logits(model(tokens[first:last], _one_row_context(first, last, pool, tokens.device)))
        difference = _difference(logits, reference[first:last])
        if not difference <= allowed:
            raise WeightsError(
                f"{type(model.model).__name__} gives other logits with paged attention than with its own (relative "
                f"difference {difference:.2g}, limit {allowed:.2g}): it seems to have state or attention terms that "
                f"are not supported{'' if dtype == torch.float32 else '; if it is rounding, float32 runs it'}"
            )


def _one_row_context(first: int, last: int, pool: KVPool, device: torch.device) -> ForwardContext:
    """Tokens `first` to `last` of a request that holds the pool's pages in order."""
    positions = torch.arange(first, last, device=device)

    def int32(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return ForwardContext(
        positions=positions,
        slot_mapping=positions,
        cu_q=int32(0, last - first),
        seq_lens=int32(last),
        block_table=int32(*range(pool.num_pages))[None],
        query_lens=[last - first],
        context_lens=[last],
        num_decodes=0,
        kv_pool=pool,
        backend=TorchBackend(),
    )
