"""Compare the scorer's speed with transformers' pipeline, sorted batches and vLLM's `classify` on the same texts.

    python -m benchmarks.scorer --json benchmarks/results/scorer.json            # a backbone of 13M parameters
    python -m benchmarks.scorer --size 100m --json benchmarks/results/scorer-100m.json
    python -m benchmarks.scorer --profile                                        # how the scorer spends its time

Every round has new texts and gives them to one system after the other. Results are medians over the rounds. The two
sets of texts are `mixed`, with 10 to 500 tokens, and `shared_prefix`, with 16 answers under each of 4 preferences of a
prompt. `ours_processes` is the scorer with one process per core.

Results per set, data type and system:
    tokens_per_second: tokens of the texts per second, computed or shared
    max_score_difference: largest difference from the scorer's logits in float32
    share_of_peak: 2 floating-point operations per parameter and token, over the rate of a matrix product in that type
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.about import RESULTS, machine
from metaalign_rl.core.arguments import path
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.files import write_json
from metaalign_rl.core.meta_prompt import MetaPrompt

SIZES = {"1m": (128, 4, 384), "13m": (384, 7, 1024), "100m": (768, 12, 2688)}  # hidden size, layers, feed-forward
TYPES = {"fp32": "float32", "bf16": "bfloat16"}
CONTEXT = 640
Found = dict[str, dict[str, dict[str, dict[str, float]]]]  # results by set, data type and system
Logits = list[list[float]]
System = Callable[[Sequence[Row], Sequence[str]], Logits]  # takes rows and the same rows as texts


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=path, default=RESULTS / "scorer.json", help="the JSON file to write")
    parser.add_argument("--size", choices=SIZES, default="13m", help="parameters of the backbone (default: 13m)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    rows = 64 * len(os.sched_getaffinity(0))  # one window for each process of `ours_processes`
    parser.add_argument("--rows", type=int, default=rows, help="texts per round (default: 64 per core)")
    parser.add_argument("--without-vllm", action="store_true", help="skip vLLM")
    parser.add_argument("--profile", action="store_true", help="print how the scorer spends its time; write nothing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, words = make_model(Path(folder), SIZES[args.size])
        if args.profile:
            profile(model, words, args.rows)
            return
        found: Found = {"mixed": {}, "shared_prefix": {}}
        for name, dtype in TYPES.items():
            systems = make_systems(model, dtype, with_vllm=not args.without_vllm)
            for kind, part in found.items():
                part[name] = measure(kind, systems, model, words, dtype, args.rounds, args.rows)
                show(kind, name, part[name])
            write_json(args.json, {"size": args.size, "machine": machine(), "bars": bars(found), **found})
            del systems
    for bar, (ratio, least) in bars(found).items():
        print(f"{'ok    ' if ratio >= least else 'MISSED'} {bar}: {ratio:.2f}, expected at least {least}")


def bars(found: Found) -> dict[str, tuple[float, float]]:
    """Return the scorer's rate over another system's, and the minimum of this ratio, by comparison.

    The pipeline is compared with default settings: the scorer in bfloat16 where the hardware is fast at it, and
    transformers' pipeline in float32.
    """
    import torch

    from reward.scorer import default_dtype

    as_it_comes = "bf16" if default_dtype(torch.device("cpu")) else "fp32"
    wanted = [("mixed", as_it_comes, "fp32", "pipeline_b1", 3.0), ("mixed", as_it_comes, "fp32", "pipeline_b32", 3.0)]
    for dtype in TYPES:
        wanted += [
            ("mixed", dtype, dtype, "vllm_classify", 1.0),
            ("shared_prefix", dtype, dtype, "vllm_classify", 3.0),
            ("shared_prefix", dtype, dtype, "vllm_prefix_cached", 1.2),
        ]
    return {
        f"{kind}, {mine} over {system} in {other}": (
            found[kind][mine]["ours"]["tokens_per_second"] / found[kind][other][system]["tokens_per_second"],
            least,
        )
        for kind, mine, other, system, least in wanted
        if mine in found[kind] and system in found[kind].get(other, {})
    }


def make_model(folder: Path, size: tuple[int, int, int]) -> tuple[Path, list[str]]:
    """Write a random reward model. Return its folder and the words that are single tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from metaalign_rl.core.meta_prompt import install
    from metaalign_rl.data.world import build as world
    from metaalign_rl.data.world.tokenizer import build_tokenizer
    from reward import model as checkpoints

    rows = world.demonstrations(0, 2000, follow_rate=1.0)
    tokenizer = build_tokenizer(text for row in rows for text in (row.system_info, row.user_info, row.response or ""))
    tokenizer.model_max_length = CONTEXT
    install(tokenizer)
    hidden, layers, wide = size
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, intermediate_size=wide,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=CONTEXT,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model, tokenizer = checkpoints.build(folder / "base")
    torch.nn.init.normal_(checkpoints.head(model).weight, std=0.1)
    checkpoints.save(model, tokenizer, folder / "model")
    words = [
        token.removeprefix("▁") for token in tokenizer.get_vocab() if token.startswith("▁") and token[1:].isalpha()
    ]
    return folder / "model", sorted(words)


def make_systems(model: Path, dtype: str, with_vllm: bool) -> dict[str, System]:
    """Load the systems to compare."""
    from reward import Scorer, ScorerPool

    def ours(scorer: Scorer | ScorerPool) -> System:
        return lambda rows, texts: [list(score.logits.values()) for score in scorer.score(rows)]

    systems: dict[str, System] = {
        "ours": ours(Scorer.from_pretrained(model, device="cpu", dtype=dtype)),
        "ours_processes": ours(ScorerPool(model, ["cpu"] * len(os.sched_getaffinity(0)), dtype)),
        "pipeline_b1": pipeline(model, dtype, 1),
        "pipeline_b32": pipeline(model, dtype, 32),
        "sorted": sorted_batches(model, dtype),
    }
    if with_vllm:
        systems |= {
            "vllm_classify": vllm_classify(model, dtype, prefix_caching=False),
            "vllm_prefix_cached": vllm_classify(model, dtype, prefix_caching=True),
        }
    return systems


def pipeline(model: Path, dtype: str, batch_size: int) -> System:
    """Load transformers' pipeline with its default settings."""
    from transformers import pipeline as make

    from metaalign_rl.core.dataflow import LABELS

    classify = make("text-classification", model=str(model), device="cpu", dtype=dtype)

    def run(rows: Sequence[Row], texts: Sequence[str]) -> Logits:
        found = classify(list(texts), batch_size=batch_size, top_k=None, function_to_apply="none")
        return [[{one["label"]: one["score"] for one in text}[label] for label in LABELS] for text in found]

    return run


def sorted_batches(model: Path, dtype: str) -> System:
    """Load the model with a simple batching: texts sorted by length, in padded batches of 32."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype).eval()

    @torch.inference_mode()
    def run(rows: Sequence[Row], texts: Sequence[str]) -> Logits:
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        found: Logits = [[] for _ in texts]
        for start in range(0, len(order), 32):
            part = order[start : start + 32]
            inputs = tokenizer([texts[i] for i in part], padding=True, add_special_tokens=False, return_tensors="pt")
            for index, logits in zip(part, loaded(**inputs).logits.float().tolist(), strict=True):
                found[index] = logits
        return found

    return run


def vllm_classify(model: Path, dtype: str, prefix_caching: bool) -> System:
    """Load vLLM's `LLM.classify` in this process with all cores, which was its fastest setup."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # otherwise it leaves one core free
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, PoolingParams

    engine = LLM(
        str(model), runner="pooling", dtype=dtype, max_model_len=CONTEXT, enable_prefix_caching=prefix_caching,
        enforce_eager=True,
    )  # fmt: skip

    def run(rows: Sequence[Row], texts: Sequence[str]) -> Logits:
        found = engine.classify(list(texts), pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        return [output.outputs.probs for output in found]

    return run


def measure(
    kind: str, systems: dict[str, System], model: Path, words: list[str], dtype: str, rounds: int, count: int
) -> dict[str, dict[str, float]]:
    """Measure every system on one set of texts in one data type."""
    from reward import Scorer

    exact = Scorer.from_pretrained(model, device="cpu", dtype="float32")
    operations = 2 * sum(p.numel() for layer in exact.model.base_model.layers for p in layer.parameters())
    peak = matrix_product_peak(dtype)
    rates: dict[str, list[float]] = {name: [] for name in systems}
    worst = dict.fromkeys(systems, 0.0)
    make = mixed_rows if kind == "mixed" else shared_rows
    for number in range(rounds + 1):
        rows = make(words, random.Random(f"{kind} {number}"), count)
        texts = [MetaPrompt(r.system_info, r.user_info).render(exact.tokenizer, r.messages, r.response) for r in rows]
        tokens = sum(len(ids) for ids in exact.tokenizer(texts, add_special_tokens=False)["input_ids"])
        expected = [list(score.logits.values()) for score in exact.score(rows)]
        for name in random.Random(number).sample(list(systems), len(systems)):
            began = time.perf_counter()
            logits = systems[name](rows, texts)
            seconds = time.perf_counter() - began
            if number:  # the first round warms up
                rates[name].append(tokens / seconds)
            off = max(
                abs(a - b) for one, two in zip(logits, expected, strict=True) for a, b in zip(one, two, strict=True)
            )
            worst[name] = max(worst[name], off)
    return {
        name: {
            "tokens_per_second": statistics.median(found),
            "max_score_difference": worst[name],
            "share_of_peak": statistics.median(found) * operations / peak,
        }
        for name, found in rates.items()
    }


def mixed_rows(words: list[str], rng: random.Random, count: int) -> list[Row]:
    """Make texts of 10 to 500 tokens, with evenly distributed logarithms of the length."""
    return [_row(words, rng, round(10 * 50 ** rng.random()), answer=rng.randint(2, 5)) for _ in range(count)]


def shared_rows(words: list[str], rng: random.Random, count: int) -> list[Row]:
    """Make 16 answers of 10 to 60 tokens under each of 4 preferences of a prompt of 100 to 300 tokens."""
    rows = []
    while len(rows) < count:
        question = _say(words, rng, rng.randint(100, 300))
        for _ in range(4):
            wish = _say(words, rng, 20)
            rows += [_make(wish, question, _say(words, rng, rng.randint(10, 60))) for _ in range(16)]
    return rows


def _row(words: list[str], rng: random.Random, tokens: int, answer: int) -> Row:
    tokens = max(2, tokens - answer - 6)
    wish = min(tokens - 1, 12)
    return _make(_say(words, rng, wish), _say(words, rng, tokens - wish), _say(words, rng, answer))


def _say(words: list[str], rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(words, k=count))


def _make(wish: str, question: str, answer: str) -> Row:
    messages = [{"role": "user", "content": question}]
    return Row(
        id="bench", family="helpful", relation="system_only", tier="system",
        system_info=wish, user_info="", messages=messages, response=answer,
    )  # fmt: skip


def profile(model: Path, words: list[str], count: int) -> None:
    """Print the share of the scorer's time by kind of operation, for each set and data type."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace

    from reward import Scorer

    kinds = {"matrix products": ("mm",), "attention": ("scaled_dot", "flash")}
    for dtype in TYPES.values():
        scorer = Scorer.from_pretrained(model, device="cpu", dtype=dtype)
        for name, make in (("mixed", mixed_rows), ("shared_prefix", shared_rows)):
            texts = [scorer.encode(row, "row") for row in make(words, random.Random(0), count)]
            scorer.logits(texts)
            with trace(activities=[ProfilerActivity.CPU]) as seen:
                scorer.logits(texts)
            seconds: dict[str, float] = dict.fromkeys([*kinds, "everything else"], 0.0)
            for event in seen.key_averages():
                kind = next((k for k, parts in kinds.items() if any(p in event.key for p in parts)), "everything else")
                seconds[kind] += event.self_cpu_time_total
            shares = ", ".join(f"{kind} {value / sum(seconds.values()):.0%}" for kind, value in seconds.items())
            print(f"{name:<13} {dtype:<8} {shares}")


def matrix_product_peak(dtype: str, size: int = 2048) -> float:
    """Return the floating-point operations per second of a large matrix product, the best of six."""
    import torch

    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def show(kind: str, dtype: str, found: dict[str, dict[str, float]]) -> None:
    """Print one line per system."""
    ours = found["ours"]["tokens_per_second"]
    for name, figures in found.items():
        rate = figures["tokens_per_second"]
        print(
            f"{kind:<13} {dtype} {name:<18} {rate:9,.0f} tokens/s  ours is {ours / rate:5.2f} times as fast  "
            f"scores differ by {figures['max_score_difference']:.1e}  {figures['share_of_peak']:.0%} of the peak",
            flush=True,
        )


if __name__ == "__main__":
    main()
