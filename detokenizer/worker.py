"""The detokenizer process: token ids become text and go to the frontend; stop strings end a request here.

Keeps the state of each request from its first `TokenOut` to its last word. On a stop string it ends the request at
once, and aborts it at the scheduler; what still comes of it is then unknown here and passes by. So does a request whose
tokens cannot be decoded, with a failure.
"""

import logging

import msgspec

from ramet.detokenizer.config import DetokenizerConfig
from ramet.detokenizer.incremental import IncrementalText
from ramet.ipc.channel import DETOKENIZER, FRONTEND, SCHEDULER, Addresses, Inbox, Outbox
from ramet.ipc.errors import Failure, FailureKind
from ramet.ipc.messages import (
    Abort,
    Admitted,
    Failed,
    Finish,
    FinishReason,
    Logprob,
    PromptInfo,
    Reset,
    TextBatch,
    TextDelta,
    ToDetokenizer,
    TokenOut,
    TokenText,
)
from ramet.ipc.pulse import BEAT_S, Pulse
from ramet.ipc.start import Startup
from ramet.tokenizer_worker.tokenizer import Tokenizer, TokenizerError

logger = logging.getLogger(__name__)


def run(config: DetokenizerConfig, addresses: Addresses) -> None:
    """Serve until the process is told to stop. Exits with status 1 if the tokenizer cannot be loaded."""
    startup = Startup(DETOKENIZER, addresses)
    inbox: Inbox[ToDetokenizer] = Inbox(addresses.inbox(DETOKENIZER), ToDetokenizer)
    with startup.failing_with(TokenizerError):
        detokenizer = Detokenizer(Tokenizer(config.tokenizer_dir), config.stream_interval)
    scheduler, frontend = Outbox(addresses.inbox(SCHEDULER)), Outbox(addresses.inbox(FRONTEND))
    pulse = Pulse(addresses, DETOKENIZER)
    startup.ready()
    while True:
        pulse.beat()
        if (message := inbox.receive(BEAT_S)) is None:
            continue
        if isinstance(message, Reset):
            detokenizer.reset()
            frontend.send(message)
            continue
        deltas: list[TextDelta] = []
        for item in message.items:
            failure = item.failure
            try:
                deltas += detokenizer.add(item) if failure is None else []
            # One odd answer must not end the process that all answers go through. A panic in Rust is no Exception.
            except BaseException:
                logger.exception("the tokens of request %s could not be decoded", item.rid)
                failure = Failure(FailureKind.INTERNAL, "the answer could not be decoded")
                scheduler.send(Abort([item.rid]))
            if failure is not None:
                detokenizer.forget(item.rid)
                frontend.send(Failed([item.rid], failure))
        if deltas:
            frontend.send(TextBatch(deltas))
        if stopped := detokenizer.take_stopped():
            scheduler.send(Abort(stopped))


class _Stream(msgspec.Struct):
    """One request: its text, and what has not been sent of it."""

    text: IncrementalText
    prompt: PromptInfo | None
    stream: bool
    texts: list[str] = []
    logprobs: list[TokenText] = []
    token_ids: list[int] = []


class Detokenizer:
    """The state of all requests. Does not know sockets."""

    def __init__(self, tokenizer: Tokenizer, stream_interval: int) -> None:
        self._tokenizer = tokenizer
        self._interval = stream_interval
        self._streams: dict[str, _Stream] = {}
        self._stopped: list[str] = []

    def add(self, item: TokenOut) -> list[TextDelta]:
        """What is to be sent of a request's news: at most one delta."""
        if item.admitted is not None:
            self._streams[item.rid] = self._open(item.admitted)
        stream = self._streams.get(item.rid)
        if stream is None:
            # Never had a token, or ended here by a stop string: only its end is news, to whom it may concern.
            return [TextDelta(item.rid, "", 0, finish=item.finish)] if item.finish is not None else []
        finish = self._read(stream, item)
        if finish is None and not self._is_due(stream):
            return []
        delta = TextDelta(
            rid=item.rid,
            text="".join(stream.texts),
            completion_tokens=stream.text.num_tokens,
            prompt=stream.prompt,
            logprobs=stream.logprobs or None,
            finish=finish,
            token_ids=stream.token_ids,
        )
        stream.texts, stream.logprobs, stream.prompt, stream.token_ids = [], [], None, []
        if finish is not None:
            del self._streams[item.rid]
            if item.finish is None:
                self._stopped.append(item.rid)
        return [delta]

    def forget(self, rid: str) -> None:
        """The request has failed."""
        self._streams.pop(rid, None)

    def reset(self) -> None:
        """Forget all requests."""
        self._streams.clear()

    def take_stopped(self) -> list[str]:
        """Requests that a stop string ended since the last call."""
        stopped, self._stopped = self._stopped, []
        return stopped

    def _read(self, stream: _Stream, item: TokenOut) -> Finish | None:
        """Take in the tokens; the request's end, if it has come."""
        last = len(item.token_ids) - 1
        for i, token_id in enumerate(item.token_ids):
            if item.logprobs is not None:
                stream.logprobs.append(self._describe(item.logprobs[i]))
            stream.texts.append(stream.text.add(token_id, item.finish if i == last else None))
            stream.token_ids.append(token_id)
            if stream.text.matched_stop is not None:
                return Finish(FinishReason.STOP, stream.text.matched_stop)
        if not item.token_ids:  # aborted: what was held back is text after all
            stream.texts.append(stream.text.add(None, item.finish))
        return item.finish

    def _is_due(self, stream: _Stream) -> bool:
        """Whether a request that goes on has something to send: its first event always, later ones if streamed."""
        return stream.prompt is not None or (stream.stream and len(stream.token_ids) >= self._interval)

    def _open(self, admitted: Admitted) -> _Stream:
        ids, text, tokens = admitted.prompt_ids, None, None
        if ids is not None:
            text = self._tokenizer.decode(ids, skip_special_tokens=admitted.params.skip_special_tokens)
        if ids is not None and admitted.prompt_logprobs is not None:
            tokens = [
                self._describe(logprob if logprob is not None else Logprob(token_id, float("nan")))
                for token_id, logprob in zip(ids, admitted.prompt_logprobs, strict=True)
            ]
        prompt = msgspec.structs.replace(admitted.prompt, text=text, tokens=tokens)
        return _Stream(IncrementalText(self._tokenizer, admitted.params), prompt, admitted.stream)

    def _describe(self, logprob: Logprob) -> TokenText:
        top = [self._describe(Logprob(*other)) for other in zip(logprob.top_ids, logprob.top_logprobs, strict=True)]
        data = self._tokenizer.token_bytes(logprob.token_id)
        return TokenText(data.decode("utf-8", errors="replace"), data, logprob.logprob, top, logprob.token_id)
