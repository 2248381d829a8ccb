"""Prompts become requests, or are refused with the numbers."""

import json
import shutil
import signal
import time

import pytest
import transformers

from ramet.ipc.errors import FailureKind, RequestError
from ramet.ipc.messages import Chat, Completion, Embed, Embedding, Job
from ramet.ipc.sampling import Grammar, GrammarKind, SamplingParams, Thought
from ramet.tokenizer_worker import chat_template
from ramet.tokenizer_worker.config import TokenizerConfig
from ramet.tokenizer_worker.worker import Encoder

CONTEXT = 64
USER = [{"role": "user", "content": "Where is Rome?"}]


@pytest.fixture
def folder(tiny_model):
    return str(tiny_model("llama"))


@pytest.fixture
def make_encoder(folder):
    def make(**settings) -> Encoder:
        defaults = {"tokenizer_dir": folder, "context_length": CONTEXT, "vocab_size": 512}
        return Encoder(TokenizerConfig(**{**defaults, **settings}))

    return make


def job(*rids: str, **params) -> Job:
    return Job(list(rids) or ["r"], SamplingParams(**params))


def test_chat_is_rendered_as_transformers_does(make_encoder, folder):
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "Be brief."}, *USER]
    (request,) = make_encoder().encode(Chat(job(), messages))
    expected = reference.apply_chat_template(messages, add_generation_prompt=True)
    assert request.prompt_ids == list(expected["input_ids"])


def test_continue_final_message_ends_with_its_text(make_encoder, folder):
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [*USER, {"role": "assistant", "content": "Rome is in"}]
    chat = Chat(job(), messages, add_generation_prompt=False, continue_final_message=True)
    (request,) = make_encoder().encode(chat)
    expected = reference.apply_chat_template(messages, continue_final_message=True)
    assert request.prompt_ids == list(expected["input_ids"])


@pytest.mark.parametrize(
    ("said", "thought"),
    [
        ("Rome", Thought("<t>", "</t>")),
        ("Rome <t>\n", Thought("<t>", "</t>", opened=True)),
        ("<t>\n\n</t>\n\n", None),
    ],
)
def test_the_end_of_the_prompt_tells_what_reasoning_may_follow(make_encoder, said, thought):
    grammar = Grammar(GrammarKind.REGEX, "a", "regex", thought=Thought("<t>", "</t>"))
    messages = [*USER, {"role": "assistant", "content": said}]
    chat = Chat(job("a", "b", grammar=grammar), messages, add_generation_prompt=False, continue_final_message=True)
    for request in make_encoder().encode(chat):
        assert request.params.grammar == Grammar(GrammarKind.REGEX, "a", "regex", thought=thought)


def test_choices_share_the_prompt_and_differ_in_seed(make_encoder):
    requests = make_encoder().encode(Completion(job("a", "b", seed=41), "The quick brown fox"))
    assert [(r.rid, r.params.seed) for r in requests] == [("a", 41), ("b", 42)]
    assert requests[0].prompt_ids == requests[1].prompt_ids


def test_token_ids_are_taken_as_they_are(make_encoder):
    (request,) = make_encoder().encode(Completion(job(), [5, 6, 7]))
    assert request.prompt_ids == [5, 6, 7]


def test_absent_max_tokens_is_the_rest_of_the_context(make_encoder):
    (request,) = make_encoder().encode(Completion(job(), [5] * 60))
    assert request.params.max_tokens == CONTEXT - 60
    assert not request.max_tokens_given


def refusal(encoder: Encoder, message) -> RequestError:
    with pytest.raises(RequestError) as caught:
        encoder.encode(message)
    return caught.value


def test_prompt_as_long_as_the_context_is_refused_with_both_numbers(make_encoder):
    failure = refusal(make_encoder(), Completion(job(), [5] * 64)).failure
    assert failure.kind is FailureKind.CONTEXT_LENGTH_EXCEEDED
    assert failure.code == "context_length_exceeded"
    assert failure.message.count("64") == 2


def test_max_tokens_beyond_the_context_is_refused_with_the_numbers(make_encoder):
    failure = refusal(make_encoder(), Completion(job(max_tokens=30), [5] * 40)).failure
    assert failure.param == "max_tokens"
    assert all(number in failure.message for number in ("40", "30", "64"))


@pytest.mark.parametrize("prompt", ["", []])
def test_empty_prompt_is_refused(make_encoder, prompt):
    assert "empty" in refusal(make_encoder(), Completion(job(), prompt)).failure.message


@pytest.mark.parametrize("token_id", [512, -1])
def test_token_id_outside_the_vocabulary_is_named(make_encoder, token_id):
    message = refusal(make_encoder(), Completion(job(), [5, token_id])).failure.message
    assert str(token_id) in message and "512" in message


def test_a_text_to_embed(make_encoder, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    [embed] = make_encoder().work(Embedding("r", "Paris and ROME", 3))
    assert embed == Embed("r", tokenizer("Paris and ROME").input_ids, 3)
    [embed] = make_encoder(lowercase=True).work(Embedding("r", "Paris and ROME"))
    assert embed.prompt_ids == tokenizer("paris and rome").input_ids
    assert make_encoder(lowercase=True).work(Embedding("r", [7] * CONTEXT)) == [Embed("r", [7] * CONTEXT)]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([7] * 65, "this model's maximum context length is 64 tokens; the input has 65 tokens"),
        ([], "the input is empty"),
        ("x" * 10_000, "the input has 10000 characters, at most 8192"),
        ([512], "token id 512 is outside the vocabulary of 512"),
    ],
)
def test_what_cannot_be_embedded_names_the_input(make_encoder, prompt, words):
    with pytest.raises(RequestError, match=words) as caught:
        make_encoder().work(Embedding("r", prompt))
    assert caught.value.failure.param == "input"


def test_how_long_a_text_may_take_is_told_before(folder):
    told = []
    encoder = Encoder(TokenizerConfig(tokenizer_dir=folder, context_length=CONTEXT, vocab_size=512), told.append)
    encoder.work(Embedding("r", "word " * 12))
    assert told == [pytest.approx(60 * 30e-6)]


def test_model_without_template_refuses_chats(make_encoder, folder, tmp_path):
    shutil.copy(f"{folder}/tokenizer.json", tmp_path)
    encoder = make_encoder(tokenizer_dir=str(tmp_path))
    assert "--chat-template" in refusal(encoder, Chat(job(), USER)).failure.message
    assert make_encoder(tokenizer_dir=str(tmp_path), chat_template="{{ messages[0].content }}").encode(
        Chat(job(), USER)
    )


def test_what_a_template_raises_reaches_the_user(make_encoder):
    encoder = make_encoder(chat_template="{{ raise_exception('roles must alternate') }}")
    failure = refusal(encoder, Chat(job(), USER)).failure
    assert failure.kind is FailureKind.INVALID_REQUEST and "roles must alternate" in failure.message


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_template_cannot_leave_its_sandbox(make_encoder, attack):
    failure = refusal(make_encoder(chat_template=attack), Chat(job(), USER)).failure
    assert "cannot render" in failure.message


def test_a_template_gets_its_share_of_time_and_no_more(make_encoder, monkeypatch):
    """Of CPU time, so that a busy machine makes no difference."""
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.3)
    loops = "{% for a in messages %}{% for b in messages %}{% for c in messages %}{% endfor %}{% endfor %}{% endfor %}x"
    encoder = make_encoder(chat_template=loops)
    started = time.process_time()
    failure = refusal(encoder, Chat(job(), USER * 2000)).failure
    assert 0.2 < time.process_time() - started < 1.5
    assert (failure.kind, failure.param) == (FailureKind.INVALID_REQUEST, "messages")
    assert "it took more than 0.3 s" in failure.message
    assert encoder._render(Chat(job(), USER * 20)) == "x"
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_template_variables_and_helpers(make_encoder):
    template = (
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}x{% endfor %}"
        "{% generation %}{{ tools | tojson }}{% endgeneration %}{{ mood }}"
    )
    tools = [{"type": "function", "function": {"name": "f<é>"}}]
    encoder = make_encoder(chat_template=template)
    chat = Chat(job(), [*USER, *USER], tools=tools, template_kwargs={"mood": "calm"})
    assert encoder._render(chat) == "x" + json.dumps(tools, ensure_ascii=False) + "calm"
