"""The rollout engine, as a Ray actor, compared with transformers on the same tiny model."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from metaalign_rl.config.schema import Config
from metaalign_rl.core.chat_template import install
from metaalign_rl.core.checkpoints import tensor_names
from metaalign_rl.core.dataflow import Request, Sample, Sampling
from metaalign_rl.core.errors import UserError
from metaalign_rl.rollout.engine import THREADS, RolloutEngine
from metaalign_rl.runtime.actor_options import actor_environment
from metaalign_rl.weights import StaleEngine, assert_fresh, buckets, confirm, store
from metaalign_rl.weights.sender import Sender
from metaalign_rl.weights.sync_plan import SyncPlan

EOS = 1
SPECIAL = ["<pad>", "<eos>", "<User>", "<Assistant>", "<System Info>", "<User Info>"]
VOCABULARY = [*SPECIAL, *(f"w{i}" for i in range(300 - len(SPECIAL)))]
MAX_TOKENS = 64
ONE_THREAD = {"runtime_env": {"env_vars": actor_environment(1)}}
PROMPTS = [[2, 10 + i, 20 + i, 30 + i] for i in range(8)]
REQUESTS = [Request(100 + i, prompt) for i, prompt in enumerate(PROMPTS)]


def tiny_model(*, tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=tied, eos_token_id=EOS, pad_token_id=0, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 2  # answers of all lengths: some end before the limit
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", extra_special_tokens=SPECIAL[2:]
    )
    install(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(model_folder: Path, local_ray: Config) -> Iterator[SimpleNamespace]:
    """The actor's calls, plainly; it starts with the folder's weights, as version 0."""

    class BreakableEngine(RolloutEngine):  # here, so that Ray ships its code: workers cannot import tests
        def break_loader(self) -> None:
            """From now on weights are accepted, checksummed and confirmed, but not loaded."""
            from metaalign_rl.weights.vllm_worker import ChecksummedModel

            ChecksummedModel.load_weights = lambda self, weights: list(self._digest.watch(weights))

        def set_delay(self, seconds: float) -> None:
            """Wait this long between the end of each engine step and the use of its outputs."""
            self.delay = seconds

        def _do(self, work: Any, *arguments: Any, **options: Any) -> Any:
            result = super()._do(work, *arguments, **options)
            if work.__name__ == "_step":
                time.sleep(getattr(self, "delay", 0.0))
            return result

    actor = ray.remote(**THREADS, **ONE_THREAD)(BreakableEngine).remote(
        str(model_folder), max_tokens=MAX_TOKENS, max_sequences=4
    )
    yield calls_of(actor)
    ray.kill(actor)


def calls_of(actor: ray.actor.ActorHandle) -> SimpleNamespace:
    def stream(requests: list[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        for reference in actor.generate.options(num_returns="streaming").remote(requests, sampling):
            yield ray.get(reference)

    def call(method: str, *arguments: object) -> object:
        return ray.get(getattr(actor, method).remote(*arguments))

    return SimpleNamespace(actor=actor, stream=stream, call=call)


def send(engine: SimpleNamespace, parameters: object, version: int) -> None:
    """Send weights as a learner does, in buckets of 50 kB. The tiny model fills several."""
    sent = Sender(SyncPlan("store", {0: engine.actor}, 1, 50_000, 60.0), rank=0, passes=lambda: iter(parameters)).send(
        version
    )
    for error in sent.failed.values():
        raise error
    confirm((version, sent.checksum), sent.taken[0], engine="engine 0")


def draw(engine: SimpleNamespace, requests: list[Request] = REQUESTS, **sampling: Any) -> list[Sample]:
    """All samples, in the requests' order."""
    samples = [sample for batch in engine.stream(requests, Sampling(**sampling)) for sample in batch]
    return sorted(samples, key=lambda sample: sample.index)


@torch.no_grad()
def learner_logprobs(model: LlamaForCausalLM, samples: list[Sample], temperature: float = 1.0) -> list[list[float]]:
    """transformers' log-probabilities of each sample's response tokens."""
    result = []
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        logprobs = (model(ids).logits[0, len(sample.prompt_ids) - 1 : -1] / temperature).log_softmax(-1)
        result.append(logprobs.gather(-1, ids[0, len(sample.prompt_ids) :, None])[:, 0].tolist())
    return result


def changed(seed: int, *, tied: bool = False) -> LlamaForCausalLM:
    """The model after a step that moves every tensor."""
    model, generator = tiny_model(tied=tied), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def engine_mismatch(model: LlamaForCausalLM, samples: list[Sample]) -> float:
    """Mean |engine - learner| per token, nats."""
    engine = [value for sample in samples for value in sample.logprobs]
    learner = [value for values in learner_logprobs(model, samples) for value in values]
    return fmean(abs(one - other) for one, other in zip(engine, learner, strict=True))


def test_a_new_engine_has_version_zero_and_answers_every_request_once(engine):
    samples = draw(engine)
    assert engine.call("ready") == 0
    assert [(s.index, s.prompt_ids, s.weight_version) for s in samples] == [
        (r.index, r.prompt_ids, 0) for r in REQUESTS
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probabilities_do_not_depend_on_the_sampling_temperature(engine, temperature):
    samples = draw(engine, temperature=temperature)
    for sample, expected in zip(samples, learner_logprobs(tiny_model(), samples), strict=True):
        assert sample.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_sample_says_whether_it_finished_or_was_cut(engine):
    samples = draw(engine, [Request(i, PROMPTS[i % 8]) for i in range(64)], max_new_tokens=12)
    assert {sample.finished for sample in samples} == {True, False}, "the test needs both kinds"
    for sample in samples:
        assert sample.finished == (sample.response_ids[-1] == EOS)
        assert EOS not in sample.response_ids[:-1]
        assert len(sample.response_ids) <= 12
        assert sample.finished or len(sample.response_ids) == 12


def test_top_p_leaves_out_unlikely_tokens_but_not_from_the_log_probabilities(engine):
    samples = draw(engine, [Request(i, PROMPTS[i % 8]) for i in range(16)], top_p=0.3)
    assert engine_mismatch(tiny_model(), samples) < 1e-4
    least = [min(sample.logprobs) for sample in samples]
    assert min(least) > math.log(0.7 / len(VOCABULARY))  # the others would have at least 0.7 together


def test_the_end_token_is_not_sampled_before_the_minimum_of_tokens(engine):
    requests = [Request(i, PROMPTS[i % 8]) for i in range(32)]
    assert min(len(sample.response_ids) for sample in draw(engine, requests, max_new_tokens=12)) < 6
    samples = draw(engine, requests, max_new_tokens=12, min_new_tokens=6)
    assert min(len(sample.response_ids) for sample in samples) >= 6
    assert engine_mismatch(tiny_model(), samples) < 1e-4


def test_a_stop_text_ends_a_response_and_is_not_in_its_text(engine):
    plain = draw(engine, temperature=0.0)
    stop = plain[0].text.split()[2]
    samples = draw(engine, temperature=0.0, stop=(stop,))
    assert samples[0].text.split() == plain[0].text.split()[:2]
    assert samples[0].response_ids == plain[0].response_ids[:3]
    assert samples[0].finished
    assert engine_mismatch(tiny_model(), samples) < 1e-4
    for sample in samples:
        assert stop not in sample.text
    first = plain[0].text.split()[0]  # before the minimum of tokens, a stop text ends nothing
    longer = draw(engine, temperature=0.0, stop=(first,), min_new_tokens=3)
    assert longer[0].text.split()[:2] == plain[0].text.split()[:2]
    assert len(longer[0].response_ids) >= 3


@pytest.mark.slow
def test_an_engine_of_another_temperature_reports_the_log_probabilities_of_what_it_samples(model_folder, local_ray):
    actor = ray.remote(**THREADS, **ONE_THREAD)(RolloutEngine).remote(
        str(model_folder), max_tokens=MAX_TOKENS, max_sequences=4, temperature=0.7
    )
    samples = draw(calls_of(actor), temperature=0.7)
    for sample, expected in zip(samples, learner_logprobs(tiny_model(), samples, temperature=0.7), strict=True):
        assert sample.logprobs == pytest.approx(expected, abs=1e-4)
    ray.kill(actor)


def test_text_has_no_special_tokens(engine):
    tokenizer = tiny_tokenizer()
    for sample in draw(engine):
        assert sample.text == tokenizer.decode(sample.response_ids, skip_special_tokens=True)
        assert "<" not in sample.text


def test_samples_stream_as_they_finish(engine):
    batches = list(engine.stream(REQUESTS, Sampling(max_new_tokens=20)))  # four at a time
    assert len(batches) > 1
    assert all(batches)
    assert sorted(sample.index for batch in batches for sample in batch) == [request.index for request in REQUESTS]


def test_greedy_responses_are_the_most_likely_tokens(engine):
    first, second = draw(engine, temperature=0.0), draw(engine, temperature=0.0)
    assert first == second
    model = tiny_model()
    for sample in first:
        logits = model(torch.tensor([sample.prompt_ids + sample.response_ids])).logits[0]
        assert logits[len(sample.prompt_ids) - 1 : -1].argmax(-1).tolist() == sample.response_ids


def test_a_request_s_seed_fixes_its_response_in_any_batch(engine):
    seeded = Request(0, PROMPTS[0], seed=7)
    alone, again = draw(engine, [seeded]), draw(engine, [seeded, *REQUESTS])
    assert alone[0].response_ids == again[0].response_ids
    assert len({tuple(s.response_ids) for s in draw(engine, [Request(i, PROMPTS[0]) for i in range(8)])}) > 1


def test_seeded_prompts_may_exceed_one_engine_step(engine):
    """vLLM splits such prompts by default, which crashes it on a CPU when they have seeds."""
    requests = [Request(i, [2] * 50, seed=i) for i in range(200)]
    assert len(draw(engine, requests, max_new_tokens=2)) == 200


def test_a_prompt_that_is_too_long_is_an_error_with_its_number_and_the_fix(engine):
    for prompt in ([], [5] * 60):
        with pytest.raises(UserError, match=r"request 9: a prompt of (0|60) tokens and max_new_tokens=5 .*shorten"):
            draw(engine, [Request(9, prompt)], max_new_tokens=5)
    assert len(draw(engine)) == len(REQUESTS)


def test_a_caller_that_stops_iterating_leaves_no_requests_behind(engine):
    stream = engine.stream(REQUESTS, Sampling(max_new_tokens=20))
    next(stream)
    stream.close()
    assert len(draw(engine)) == len(REQUESTS)


def test_after_new_weights_the_engine_matches_the_changed_model(engine):
    before = draw(engine, temperature=0.0)
    for version in (1, 2):
        model = changed(version)
        send(engine, list(model.named_parameters()), version)
        samples = draw(engine, temperature=0.0)
        assert engine.call("ready") == version
        assert {(sample.first_version, sample.weight_version) for sample in samples} == {(version, version)}
        assert engine_mismatch(model, samples) < 1e-4
        assert engine_mismatch(model, before) > 0.1, "the test needs weights that matter"


def test_new_weights_apply_between_two_tokens_of_responses_in_progress(engine):
    old, new = changed(1), changed(2)
    send(engine, list(old.named_parameters()), 10)
    requests = [Request(i, PROMPTS[i % 8]) for i in range(200)]
    stream = engine.stream(requests, Sampling(max_new_tokens=50))
    samples = list(next(stream))
    send(engine, list(new.named_parameters()), 11)
    samples += [sample for batch in stream for sample in batch]

    assert sorted(sample.index for sample in samples) == list(range(200))
    assert {(s.first_version, s.weight_version) for s in samples} == {(10, 10), (10, 11), (11, 11)}
    for sample in samples:
        drawn = torch.tensor(sample.logprobs)
        by = {10: learner_logprobs(old, [sample])[0], 11: learner_logprobs(new, [sample])[0]}
        # The two models differ by 1 nat or more. At an unlikely token, rounding alone exceeds 1e-4.
        fits = {version: (drawn - torch.tensor(by[version])).abs() < 1e-3 for version in by}
        assert fits[sample.first_version][0] and fits[sample.weight_version][-1]
        changes = [k for k in range(len(drawn) + 1) if fits[10][:k].all() and fits[11][k:].all()]
        assert changes, "tokens are the old model's up to one place, and the new one's from there"


def test_an_abort_right_after_a_step_keeps_what_the_step_finished(engine):
    engine.call("set_delay", 2.0)
    stream = engine.actor.generate.options(num_returns="streaming").remote(REQUESTS, Sampling(max_new_tokens=1))
    time.sleep(1.0)
    engine.call("abort")
    assert [len(ray.get(batch)) for batch in stream] == [4], "one engine step holds 4 sequences"
    engine.call("set_delay", 0.0)
    assert len(draw(engine)) == len(REQUESTS)


def test_an_engine_waiting_for_weights_sends_heartbeats_and_then_resumes(engine):
    engine.call("start_weight_update")
    stream = engine.stream(REQUESTS, Sampling())
    assert [next(stream), next(stream)] == [[], []]
    send(engine, list(changed(1).named_parameters()), 12)  # starts over: the sender of the last update died
    assert len([sample for batch in stream for sample in batch]) == len(REQUESTS)


def test_loading_a_checkpoint_equals_sending_its_weights(engine, model_folder):
    answer = engine.call("load_checkpoint", str(model_folder), 13)
    assert answer == engine.call("load_checkpoint", str(model_folder), 13)
    samples = draw(engine)
    assert {sample.weight_version for sample in samples} == {13}
    assert engine_mismatch(tiny_model(), samples) < 1e-4


def test_sleep_does_nothing_on_a_cpu(engine):
    engine.call("sleep")
    assert len(draw(engine)) == len(REQUESTS)
    engine.call("wake_up")


def test_the_checksum_detects_an_update_damaged_on_the_way(engine, monkeypatch):
    def fill(tensors, bucket_bytes):
        for bucket in buckets.fill(tensors, bucket_bytes):
            bucket.data[0] ^= 1
            yield bucket

    monkeypatch.setattr(store, "fill", fill)
    with pytest.raises(StaleEngine, match="engine 0 did not apply weight update 3: expected checksum"):
        send(engine, list(changed(3).named_parameters()), 3)


def test_an_update_that_lacks_a_tensor_is_an_error(engine):
    parameters = [(name, p) for name, p in tiny_model().named_parameters() if name != "lm_head.weight"]
    with pytest.raises(StaleEngine, match=r"weight update 4 lacks 1 of the model's .* 'lm_head.weight'"):
        send(engine, parameters, 4)


def test_log_probabilities_reveal_an_engine_that_keeps_its_old_weights(
    engine,
):
    send(engine, list(changed(5).named_parameters()), 5)
    engine.call("break_loader")

    model = changed(6)
    send(engine, list(model.named_parameters()), 6)  # nothing to see here
    samples = draw(engine)
    with pytest.raises(StaleEngine, match="weight version 6"):
        assert_fresh(engine_mismatch(model, samples), limit=0.01, version=samples[0].weight_version)


@pytest.mark.slow
def test_a_tensor_parallel_engine_of_two_processes_accepts_new_weights(model_folder, local_ray):
    actor = ray.remote(**THREADS, **ONE_THREAD)(RolloutEngine).remote(
        str(model_folder), max_tokens=MAX_TOKENS, max_sequences=4, tensor_parallel=2
    )
    pair, model = calls_of(actor), changed(1)
    assert engine_mismatch(tiny_model(), draw(pair)) < 1e-4
    send(pair, list(model.named_parameters()), 1)
    assert engine_mismatch(model, draw(pair)) < 1e-4
    ray.kill(actor)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def tied(request, tmp_path_factory, local_ray) -> Iterator[SimpleNamespace]:
    """An engine on a model with tied embeddings, whose folder stores the output layer all the same, as some do."""
    folder = tmp_path_factory.mktemp("tied")
    model = tiny_model(tied=True)
    tiny_tokenizer().save_pretrained(folder)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")

    actor = ray.remote(**THREADS, **ONE_THREAD)(RolloutEngine).remote(
        str(folder), max_tokens=MAX_TOKENS, max_sequences=4, dtype=request.param
    )
    yield SimpleNamespace(**vars(calls_of(actor)), folder=folder, rounding=1e-4 if request.param == "float32" else 0.1)
    ray.kill(actor)


def test_an_engine_with_tied_embeddings_uses_the_new_output_layer_after_every_update(tied):
    assert engine_mismatch(tiny_model(tied=True), draw(tied)) < tied.rounding
    for version in (1, 2):
        model = changed(version, tied=True)
        parameters = [(name, p) for name, p in model.named_parameters()]
        assert "lm_head.weight" not in dict(parameters)
        send(tied, parameters, version)  # the checksums of both ends agree
        assert engine_mismatch(model, draw(tied)) < tied.rounding
        with torch.no_grad():
            model.lm_head.weight = torch.nn.Parameter(tiny_model(tied=True).lm_head.weight)
        assert engine_mismatch(model, draw(tied)) > 0.3, "the test needs an output layer that matters"


def test_an_engine_with_tied_embeddings_loads_a_checkpoint(tied):
    answer = tied.call("load_checkpoint", str(tied.folder), 7)
    assert answer == tied.call("load_checkpoint", str(tied.folder), 7)
    assert engine_mismatch(tiny_model(tied=True), draw(tied)) < tied.rounding


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such model folder"):
        tensor_names(tmp_path / "absent")
    with pytest.raises(UserError, match="expected model.safetensors or model.safetensors.index.json, found neither"):
        tensor_names(tmp_path)
