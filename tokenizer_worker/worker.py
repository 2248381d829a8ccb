"""A tokenizer process: prompts become token ids, and are checked against the context, before they reach the scheduler.

Requests of one id always come to the same worker, and their aborts too, in order. A request that cannot be encoded
ends here with `Failed`. Does not know sampling beyond the length of the output.
"""

import logging
import time
from collections.abc import Callable, Sequence

import jinja2
import msgspec

from ramet.ipc.channel import FRONTEND, SCHEDULER, TOKENIZER, Addresses, Inbox, Outbox
from ramet.ipc.errors import Failure, FailureKind, RequestError, invalid
from ramet.ipc.messages import (
    Abort,
    Chat,
    Completion,
    Detokenize,
    Detokenized,
    Embed,
    Embedding,
    Failed,
    FlushCache,
    Generate,
    Job,
    PromptInfo,
    Reset,
    Tokenize,
    Tokenized,
    ToTokenizer,
    rids_of,
)
from ramet.ipc.pulse import BEAT_S, Pulse
from ramet.ipc.sampling import SamplingParams
from ramet.ipc.start import Startup
from ramet.tokenizer_worker.chat_template import ChatTemplate, load_chat_template
from ramet.tokenizer_worker.config import TokenizerConfig
from ramet.tokenizer_worker.infill import find_infill
from ramet.tokenizer_worker.tokenizer import Tokenizer, TokenizerError

logger = logging.getLogger(__name__)

# Far above what text has. Ten megabytes take half a minute to encode, during which everybody else waits.
_MAX_CHARS_PER_TOKEN = 128
# Ten times as long: a machine that is busy leaves this process so little.
_MOST_S_PER_CHAR = 30e-6


def run(index: int, config: TokenizerConfig, addresses: Addresses) -> None:
    """Serve until the process is told to stop. Exits with status 1 if the tokenizer cannot be loaded."""
    name = TOKENIZER.format(index)
    startup = Startup(name, addresses)
    inbox: Inbox[ToTokenizer] = Inbox(addresses.inbox(name), ToTokenizer)
    with startup.failing_with(TokenizerError, jinja2.TemplateError, OSError):
        encoder = Encoder(config, lambda next_s: pulse.beat(next_s))
    scheduler, frontend = Outbox(addresses.inbox(SCHEDULER)), Outbox(addresses.inbox(FRONTEND))
    pulse = Pulse(addresses, name)
    startup.ready()
    while True:
        pulse.beat()
        if (message := inbox.receive(BEAT_S)) is None:
            continue
        if isinstance(message, Abort | FlushCache | Reset):
            scheduler.send(message)
            continue
        try:
            for made in encoder.work(message):
                (scheduler if isinstance(made, Generate | Embed) else frontend).send(made)
        except RequestError as error:
            frontend.send(Failed(rids_of(message), error.failure))
        # One odd prompt must not end the process that all prompts go through. A panic in Rust is no Exception.
        except BaseException:
            logger.exception("a prompt could not be encoded")
            failure = Failure(FailureKind.INTERNAL, "the prompt could not be encoded")
            frontend.send(Failed(rids_of(message), failure))


# Enough to hold what a template may open an answer with.
_TAIL_CHARS = 64


class Encoder:
    """From a prompt or a conversation to the requests of its choices. Raises `RequestError`. `expect` is told how many
    seconds an encoding may take, before it begins."""

    def __init__(self, config: TokenizerConfig, expect: Callable[[float], None] = lambda next_s: None) -> None:
        self._config = config
        self._expect = expect
        self._tokenizer = Tokenizer(config.tokenizer_dir)
        self._template: ChatTemplate | None = load_chat_template(config.tokenizer_dir, config.chat_template)
        self._infill = find_infill(self._tokenizer)

    def work(
        self, message: Chat | Completion | Embedding | Tokenize | Detokenize
    ) -> Sequence[Generate | Embed | Tokenized | Detokenized]:
        """What a message becomes: requests for the scheduler, or an answer to the frontend."""
        match message:
            case Embedding():
                ids = message.prompt
                if isinstance(ids, str):
                    text = ids.lower() if self._config.lowercase else ids
                    ids = self._encode(text, add_special_tokens=True, param="input")
                self._check_ids(ids, "input")
                if len(ids) > self._config.context_length:
                    raise self._too_long(f"the input has {len(ids)} tokens", "input")
                return [Embed(message.rid, ids, message.priority)]
            case Tokenize():
                if isinstance(message.prompt, Chat):
                    ids = self._encode(self._render(message.prompt), add_special_tokens=False)
                else:
                    ids = self._encode(message.prompt, message.add_special_tokens)
                return [Tokenized(message.rid, ids, [self._tokenizer.spelling(i) for i in ids])]
            case Detokenize():
                if message.token_ids:
                    self._check_ids(message.token_ids)
                text = self._tokenizer.decode(message.token_ids, message.skip_special_tokens)
                return [Detokenized(message.rid, text)]
            case _:
                return self.encode(message)

    def _encode(self, text: str, add_special_tokens: bool, param: str | None = None) -> list[int]:
        self._prepare(len(text), param)
        return self._tokenizer.encode(text, add_special_tokens)

    def _prepare(self, num_chars: int, param: str | None = None) -> None:
        limit = _MAX_CHARS_PER_TOKEN * self._config.context_length
        if num_chars > limit:
            what = param or "prompt"
            raise self._too_long(f"the {what} has {num_chars} characters, at most {limit} are tokenized here", param)
        self._expect(_MOST_S_PER_CHAR * num_chars)

    def encode(self, message: Chat | Completion) -> list[Generate]:
        """One request per choice, all with the same prompt; choice i has the seed of the first plus i."""
        job, params, tail = message.job, message.job.params, ""
        if isinstance(message, Chat):
            # The template writes the special tokens itself.
            text = self._render(message)
            ids, tail = self._encode(text, add_special_tokens=False), text[-_TAIL_CHARS:]
            if (grammar := params.grammar) is not None and grammar.thought is not None:
                grammar = msgspec.structs.replace(grammar, thought=grammar.thought.after(tail))
                params = msgspec.structs.replace(params, grammar=grammar)
        elif message.suffix is None:
            prompt = message.prompt
            ids = self._encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
        else:
            ids, params = self._between(message, params)
        max_tokens = self._check_lengths(ids, job)
        info = PromptInfo(tail=tail, tokenized_at=time.monotonic())
        return [
            Generate(
                rid=rid,
                prompt_ids=ids,
                params=msgspec.structs.replace(params, max_tokens=max_tokens, seed=(params.seed or 0) + i),
                max_tokens_given=params.max_tokens is not None,
                priority=job.priority,
                echo=job.echo,
                stream=job.stream,
                prompt=info,
            )
            for i, rid in enumerate(job.rids)
        ]

    def _between(self, message: Completion, params: SamplingParams) -> tuple[list[int], SamplingParams]:
        """Fill in the middle; a token that ends the middle ends the answer."""
        if self._infill is None:
            words = "suffix is not supported by this model: its tokenizer has no fill-in-the-middle tokens"
            raise invalid(words, "suffix", "unsupported_parameter")
        assert isinstance(message.prompt, str) and message.suffix is not None
        self._prepare(len(message.prompt) + len(message.suffix))
        ids = self._infill.encode(message.prompt, message.suffix)
        if params.ignore_eos:
            return ids, params
        return ids, msgspec.structs.replace(params, stop_token_ids=(*params.stop_token_ids, *self._infill.ends))

    def _render(self, chat: Chat) -> str:
        if self._template is None:
            raise invalid("this model has no chat template: use --chat-template or /v1/completions", "messages")
        return self._template.render(chat)

    def _check_lengths(self, ids: list[int], job: Job) -> int:
        """The request's max_tokens: what was asked, or the rest of the context."""
        context, prompt_len, wanted = self._config.context_length, len(ids), job.params.max_tokens
        self._check_ids(ids)
        if prompt_len >= context and wanted != 0:
            raise self._too_long(f"the prompt has {prompt_len} tokens", None)
        if wanted is not None and prompt_len + wanted > context:
            raise self._too_long(f"the prompt has {prompt_len} tokens and max_tokens is {wanted}", "max_tokens")
        return context - prompt_len if wanted is None else wanted

    def _too_long(self, words: str, param: str | None) -> RequestError:
        """It begins with OpenAI's words, by which clients tell this error from others."""
        message = f"this model's maximum context length is {self._config.context_length} tokens; {words}"
        kind = FailureKind.CONTEXT_LENGTH_EXCEEDED
        return RequestError(kind, message, param=param, code="context_length_exceeded")

    def _check_ids(self, ids: list[int], param: str = "prompt") -> None:
        if not ids:
            raise invalid(f"the {param} is empty: it has no tokens", param)
        outside = next((i for i in ids if not 0 <= i < self._config.vocab_size), None)
        if outside is not None:
            raise invalid(f"token id {outside} is outside the vocabulary of {self._config.vocab_size}", param)
