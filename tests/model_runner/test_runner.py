"""Plans in, results out: seeded sampling, prompt log-probabilities, memory limits."""

import pytest
import torch
import transformers
from support.engine import InlineEngine

from ramet.model_runner.attention.registry import make_backend
from ramet.model_runner.memory import PoolTooLarge

PROMPT = [5, 77, 130, 8, 250, 91, 4, 33, 60, 12, 200]


@pytest.fixture(scope="module")
def folder(tiny_model):
    torch.set_num_threads(1)
    return tiny_model("llama")


def test_seeded_request_is_the_same_alone_among_others_and_after_a_preemption(folder):
    def run(total_tokens: int, others: int) -> tuple[list[int], int]:
        engine = InlineEngine(folder, total_tokens=total_tokens, max_running=24)
        for i in range(others):
            engine.add(f"other{i}", [(7 * i + j) % 300 for j in range(5 + i)], 40, temperature=1.0, seed=i)
        engine.add("seeded", PROMPT, 40, temperature=1.0, seed=1234)
        engine.run()
        return engine.tokens["seeded"], engine.core.counters.preemptions

    alone, _ = run(1024, 0)
    among, _ = run(2048, 16)
    squeezed, preemptions = run(160, 4)
    assert alone == among
    assert preemptions > 0 and alone == squeezed
    assert len(set(alone)) > 5


def test_unlike_seeds_give_unlike_texts(folder):
    engine = InlineEngine(folder)
    for seed in (1, 2):
        engine.add(str(seed), PROMPT, 20, temperature=1.0, seed=seed)
    engine.run()
    assert engine.tokens["1"] != engine.tokens["2"]


def test_prompt_logprobs_equal_transformers_with_and_without_a_cached_prefix(folder):
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = [(13 * i) % 300 for i in range(100)]  # two chunks
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    engine = InlineEngine(folder)
    engine.add("warm", prompt, 1)
    engine.run()
    engine.add("scored", prompt, 0, prompt_logprobs=3)
    engine.run()
    (out,) = engine.outputs["scored"]
    first, *scored = out.admitted.prompt_logprobs
    assert first is None and len(scored) == 99
    for position, logprob in enumerate(scored):
        assert logprob.token_id == prompt[position + 1]
        assert logprob.logprob == pytest.approx(expected[position, logprob.token_id].item(), abs=1e-3)
        assert logprob.top_ids == expected[position].topk(3).indices.tolist()


def test_logprobs_of_generated_tokens_equal_transformers(folder):
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = InlineEngine(folder)
    engine.add("r", PROMPT, 5, logprobs=2)
    engine.run()
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT + engine.tokens["r"]])).logits[0].log_softmax(-1)
    for i, out in enumerate(engine.outputs["r"]):
        (logprob,) = out.logprobs
        line = expected[len(PROMPT) - 1 + i]
        assert logprob.logprob == pytest.approx(line[logprob.token_id].item(), abs=1e-3)
        assert logprob.top_ids == line.topk(2).indices.tolist()


def test_nan_logits_fail_their_request_and_not_the_others(folder):
    engine = InlineEngine(folder)
    with torch.no_grad():
        # The embedding of token 299 is poisoned: whoever has it in the prompt gets NaN.
        engine.runner._model.embedding.weight[299] = float("nan")
    engine.add("bad", [299, 5, 6], 4)
    engine.add("good", PROMPT, 4)
    plan = engine.core.schedule()
    engine.core.commit(plan, engine.runner.execute(plan))
    outputs = {out.rid: out for out in engine.core.take_outputs()}
    assert "NaN" in outputs["bad"].failure.message
    assert outputs["good"].failure is None
    engine.run()
    assert len(engine.tokens["good"]) == 3


def test_pool_larger_than_memory_is_refused_with_the_numbers(folder):
    with pytest.raises(PoolTooLarge, match=r"--max-total-tokens"):
        InlineEngine(folder, total_tokens=2**40)


def test_unknown_attention_backend_names_those_there_are():
    with pytest.raises(ValueError, match="torch"):
        make_backend("warp", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logprobs_have_the_same_bits_alone_in_a_batch_and_from_the_cache(tiny_model, arch, dtype):
    """Batch mates, chunks and prefix hits change nothing at all, so seeded answers cannot change either."""
    prompts = {f"r{i}": [(31 * i + 7 * j) % 300 for j in range(length)] for i, length in enumerate((3, 20, 70, 100))}
    engine = InlineEngine(tiny_model(arch), dtype=dtype, total_tokens=2048)

    def run(tag: str, rids: list[str]) -> dict[str, list[float]]:
        for rid in rids:
            engine.add(tag + rid, prompts[rid], 12, temperature=1.0, seed=3, logprobs=0)
        engine.run()
        return {rid: [lp.logprob for out in engine.outputs[tag + rid] for lp in out.logprobs] for rid in rids}

    alone = {rid: value for rid in prompts for value in run("alone", [rid]).values()}
    assert engine.core.kv.flush() > 0
    assert run("together", list(prompts)) == alone
    assert run("cached", list(prompts)) == alone
