"""PPO on tiered preferences in one file and one process, without Ray, vLLM or DeepSpeed.

    demonstrations ──► SFT policy ──► reference, and the first policy
    pairs, responses of the SFT policy ──► reward model ──► the first critic
    prompts ──► policy ──► responses ──┬──► reward model ──► rewards ────────────────────────┐
                  ▲                    └──► policy, reference, critic ──► log-probs, values ─┴──► advantages
                  └──────────────── update of policy and critic ◄───────────────────────────────────┘
    held-out prompts ──► SFT policy, PPO policy ──► responses ──► gold checks ──► table

Run `python examples/ppo_loop.py`, or change settings: `python examples/ppo_loop.py --seed 1 --steps 40`.

The data is the built-in world: short questions, and preferences that a program can check. A row states preferences in
up to two tiers: System Info (the provider's) and User Info (the user's). A response must follow the governing
preference. If the tiers conflict, it is System Info's. A row's relation says how its tiers relate, for example
`conflict` or `distractor` (a preference that must be ignored). The programs are called gold checks.

The meta-prompt, the prompt sampler, the reward model, the advantages and the losses come from metaalign_rl and reward.
`metaalign-rl run` trains with the same loop on actors: vLLM engines sample, reward workers score, DeepSpeed learners
compute log-probabilities and update.
"""

import argparse
import copy
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, HfArgumentParser
from transformers import get_linear_schedule_with_warmup as linear_schedule
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.config.schema import ModelConfig
from metaalign_rl.core.dataflow import RELATIONS, Batch, Row
from metaalign_rl.core.meta_prompt import encode_row
from metaalign_rl.core.tokenizers import load_tokenizer
from metaalign_rl.data.gold import judge, labels
from metaalign_rl.data.world.build import demonstrations, held_out_prompts, pairs, prompts
from metaalign_rl.learner.batch import make_batch
from metaalign_rl.learner.losses import Penalty, PolicyObjective, Scale, ValueObjective, spread
from metaalign_rl.learner.micro_batches import model_inputs
from metaalign_rl.ppo.advantages import gae, token_kl, token_rewards, whiten
from metaalign_rl.ppo.prompt_sampler import PromptSampler
from metaalign_rl.trainers.base_model import prepare_base
from metaalign_rl.trainers.callbacks import report_callback
from metaalign_rl.trainers.sft import collate, tokenize
from reward.scorer import Scorer
from reward.training.config import RewardTraining
from reward.training.train import train as train_reward_model


@dataclass(frozen=True)
class Config:
    """Each setting is a flag of the command line, such as `--kl-coef 0.03`."""

    seed: int = HfArg(default=0, help="seed of the data, the weights and the samples")
    hidden_size: int = HfArg(default=128, help="hidden size of each model; every model has two layers")
    demonstrations: int = HfArg(default=12_000, help="rows for SFT; 60%% of the responses follow the preference")
    pairs: int = HfArg(default=18_000, help="rows for the reward model")
    own_responses: int = HfArg(default=2_000, help="SFT policy's responses, labelled by checks, for the reward model")
    held_out: int = HfArg(default=600, help="rows for the evaluation")
    steps: int = HfArg(default=30, help="PPO steps")
    prompts_per_step: int = HfArg(default=96, help="prompts per PPO step")
    samples_per_prompt: int = HfArg(default=4, help="responses to each prompt")
    minibatch: int = HfArg(default=32, help="prompts per optimizer step, each with all its responses")
    epochs: int = HfArg(default=2, help="passes over the responses of a step")
    learning_rate: float = HfArg(default=7e-4, help="learning rate of the policy in PPO")
    critic_learning_rate: float = HfArg(default=1e-3, help="learning rate of the critic")
    kl_coef: float = HfArg(default=0.015, help="penalty per nat of KL to the SFT policy; scores are between 0 and 1")


MAX_TOKENS, MAX_NEW_TOKENS = 160, 32  # for prompt and response together, and for the response
GAMMA, LAM = 1.0, 0.95  # for generalized advantage estimation
# Share of each group of prompts in PPO, by governing tier and relation. Hard groups get more.
SAMPLER = {"system/system_only": 0.04, "user/user_only": 0.04, "system/agree": 0.06, "user/agree": 0.06}
SAMPLER |= {"system/conflict": 0.33, "system/distractor": 0.22, "user/distractor": 0.22, "dialog/neutral": 0.03}
QUESTION = "what is the capital of france?"
META_PROMPTS = (  # System Info, User Info
    ("always write in capitals.", ""),
    ("you must be formal.", "i want you to be casual."),
    ("our guests have weak eyes.", "please answer in french."),
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Show the text above as it is, and the default of each flag."""


class Response(NamedTuple):
    """One sampled response. `row` holds its text. `ids` ends with the end token, unless the response was cut off."""

    row: Row
    prompt_ids: list[int]
    ids: list[int]

    def follows(self) -> bool:
        """Whether the response passes the gold checks of its row's governing tier and dialog."""
        return bool(judge(self.row, self.row.response).following)


class Optimizer:
    """AdamW with clipped gradients. The learning rate warms up, then falls to zero."""

    def __init__(self, model: torch.nn.Module, learning_rate: float, steps: int) -> None:
        self.parameters = list(model.parameters())
        self.adamw = torch.optim.AdamW(self.parameters, learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.schedule = linear_schedule(self.adamw, steps // 20, steps)

    def step(self, loss: Tensor) -> None:
        self.adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.schedule.step()


def log(stage: str, step: int, steps: int, **metrics: float) -> None:
    """Print the metrics of a step. A long stage prints about 30 lines."""
    if step % max(1, steps // 300 * 10) == 0:  # the reward trainer reports every 10th step
        numbers = (f"{name} {value:.3f}" for name, value in metrics.items())
        print(f"{stage:6}  step {step:4}/{steps}", *numbers, sep="  ", flush=True)


def train_sft(config: Config, rows: list[Row], folder: Path) -> tuple[Any, Any]:
    """Train a new policy on the demonstrations, save it in `folder/sft` and return it with its tokenizer."""
    prepare_base(ModelConfig(hidden_size=config.hidden_size, layers=2), rows, config.seed, folder / "base")
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "base"), load_tokenizer(folder / "base")
    samples = [tokenize(row, tokenizer, MAX_TOKENS) for row in rows]  # prompt tokens have no label
    samples.sort(key=lambda sample: len(sample["input_ids"]))  # a batch of similar lengths needs little padding
    batches = [samples[start : start + 32] for start in range(0, len(samples), 32)]
    optimizer = Optimizer(policy, 2e-3, len(batches))
    for step, index in enumerate(torch.randperm(len(batches)).tolist(), start=1):
        loss = policy(**collate(batches[index], tokenizer.pad_token_id)).loss
        optimizer.step(loss)
        log("sft", step, len(batches), loss=loss.item())
    policy.save_pretrained(folder / "sft")
    tokenizer.save_pretrained(folder / "sft")
    return policy, tokenizer


def train_reward(config: Config, rows: list[Row], own: Sequence[Response], folder: Path) -> Scorer:
    """Train a reward model from the SFT policy's weights, save it in `folder/reward` and return its scorer.

    Pairs give a Bradley-Terry loss. Their responses and the policy's own are labelled, which gives a cross-entropy for
    each tier and `overall`. The policy's own responses contain the mistakes that the reward model
    will see in PPO.
    """
    labelled = [
        replace(row, id=f"own-{number}", labels={"response": labels(row, row.response)})
        for number, (row, _, _) in enumerate(own)
    ]
    settings = RewardTraining(
        learning_rate=1e-3, batch_size=16, token_weight=1.0, max_tokens=MAX_TOKENS, seed=config.seed
    )
    callback = report_callback(lambda update: log("reward", update.done, update.total, **update.metrics))
    train_reward_model(settings, rows + labelled, None, folder / "sft", folder / "reward", [callback])
    return Scorer.from_pretrained(folder / "reward", dtype="float32")


def train_ppo(config: Config, sft: Any, critic: Any, scorer: Any, tokenizer: Any, rows: Sequence[Row]) -> Any:
    """Train a copy of the SFT policy. Shapes: B responses per step, T tokens in the longest sequence."""
    policy, reference = copy.deepcopy(sft), sft
    updates = config.steps * config.epochs * math.ceil(config.prompts_per_step / config.minibatch)
    policy_optimizer = Optimizer(policy, config.learning_rate, updates)
    critic_optimizer = Optimizer(critic, config.critic_learning_rate, updates)
    sampler = PromptSampler(rows, SAMPLER, config.seed)
    for step in range(config.steps):
        began = time.monotonic()
        # 1. Rollout: several responses to each prompt, from the current policy.
        drawn = [rows[index] for index in sampler.draw(step, config.prompts_per_step)]
        responses = generate(policy, tokenizer, drawn, config.samples_per_prompt)
        # 2. Reward [B]: the reward model's probability that the response is good. PPO does not use the gold checks.
        #    They only show whether a higher reward means a better response.
        scores = scorer.score([response.row for response in responses])
        rewards = torch.tensor([score.probabilities["overall"] for score in scores])
        gold = fmean(map(Response.follows, responses))
        # 3. Log-probabilities and values before the update, [B, T-1]. Column t belongs to token t+1. Prompts have 0.
        batch = to_batch(responses, tokenizer)
        with torch.no_grad():
            batch.logprobs, batch.ref_logprobs = logprobs(policy, batch), logprobs(reference, batch)
            batch.values = values(critic, batch)
        # 4. Advantages [B, T-1]. Each token's reward is the negative KL penalty. The last token also gets the score.
        token_level = token_rewards(rewards, batch.logprobs, batch.ref_logprobs, batch.action_mask, config.kl_coef)
        advantages, batch.returns = gae(token_level, batch.values, batch.action_mask, GAMMA, LAM)
        batch.advantages = whiten(advantages, batch.action_mask)
        # 5. Update: `epochs` passes over the batch, in minibatches.
        value_loss = update(config, batch, policy, critic, policy_optimizer, critic_optimizer)
        metrics = {"reward": float(rewards.mean()), "gold": gold, "kl": mean_kl(batch), "value_loss": value_loss}
        metrics |= {"length": batch.response_tokens() / len(batch), "seconds": time.monotonic() - began}
        log("ppo", step + 1, config.steps, **metrics)
    return policy


def generate(policy: Any, tokenizer: Any, rows: Sequence[Row], copies: int = 1) -> list[Response]:
    """Sample `copies` responses to each row at temperature 1. The responses to a row are adjacent."""
    prompt_ids = [encode_row(tokenizer, row, max_tokens=MAX_TOKENS - MAX_NEW_TOKENS) for row in rows]
    padded = tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt")
    # PPO needs samples of the policy's full distribution. By default transformers keeps the 50 most likely tokens.
    tokens = policy.generate(
        **padded, do_sample=True, top_k=0, num_return_sequences=copies, max_new_tokens=MAX_NEW_TOKENS
    )
    responses, eos = [], tokenizer.eos_token_id
    for number, ids in enumerate(tokens[:, padded["input_ids"].shape[1] :].tolist()):
        if eos in ids:
            ids = ids[: ids.index(eos) + 1]
        row = replace(rows[number // copies], response=tokenizer.decode(ids, skip_special_tokens=True).strip())
        responses.append(Response(row, prompt_ids[number // copies], ids))
    return responses


def to_batch(responses: Sequence[Response], tokenizer: Any) -> Batch:
    """Prompts and responses as token ids [B, T], padded on the right, and the mask of response tokens, [B, T-1]."""
    return make_batch([(response.prompt_ids, response.ids) for response in responses], tokenizer.pad_token_id)


def logprobs(policy: Any, batch: Batch) -> Tensor:
    """[B, T-1]: the log-probability of each of the N response tokens."""
    inputs = model_inputs(batch, share_prompts=True)  # responses to one prompt share the pass over it
    hidden = inputs.run(policy.model).last_hidden_state.flatten(0, 1)  # [all tokens, H]
    hidden = hidden[inputs.sources]  # [N, H], at the token before each response token: it predicts that token
    chosen = policy.lm_head(hidden).log_softmax(-1).gather(-1, inputs.tokens[:, None])[:, 0]  # [N, V] to [N]
    return spread(chosen, batch.action_mask)


def values(critic: Any, batch: Batch) -> Tensor:
    """[B, T-1]: the critic's estimate of the sum of rewards from each response token to the end."""
    inputs = model_inputs(batch, share_prompts=True)
    return spread(inputs.run(critic).logits.flatten()[inputs.sources], batch.action_mask)


def mean_kl(batch: Batch) -> float:
    """The estimated KL to the reference in nats, as a mean over responses."""
    return float(token_kl(batch.logprobs, batch.ref_logprobs, batch.action_mask).sum(1).mean())


def update(
    config: Config, batch: Batch, policy: Any, critic: Any, policy_optimizer: Optimizer, critic_optimizer: Optimizer
) -> float:
    """Train policy and critic on the batch and return the mean value loss.

    The losses are means over response tokens, with a clip range of 0.2:
    policy: -min(r A, clip(r, 0.8, 1.2) A), with advantage A and r = exp(logprob - logprob before the update);
    value: max((v - R)^2, (clip(v, v0 - 0.2, v0 + 0.2) - R)^2) / 2, with return R and value v0 before the update.
    """
    policy_objective, value_objective = PolicyObjective(LearnerConfig()), ValueObjective(LearnerConfig())
    no_entropy, no_penalty = torch.zeros(()), Penalty(0.0, "k1")  # no entropy bonus; the KL is in the rewards
    copies, losses = config.samples_per_prompt, []
    for _ in range(config.epochs):
        for chosen in torch.randperm(config.prompts_per_step).split(config.minibatch):
            part = batch.select([prompt * copies + number for prompt in chosen.tolist() for number in range(copies)])
            scale = Scale(tokens=part.response_tokens(), samples=len(part), ranks=1)  # a loss is a mean over tokens
            policy_loss, _ = policy_objective(logprobs(policy, part), no_entropy, part, scale, no_penalty)
            policy_optimizer.step(policy_loss)
            value_loss, _ = value_objective(values(critic, part), part, scale)
            critic_optimizer.step(value_loss)
            losses.append(value_loss.item())
    return fmean(losses)


def evaluate(policy: Any, reference: Any, tokenizer: Any, rows: Sequence[Row]) -> dict[str, float]:
    """The share of responses that follow the governing preference, by relation, and the KL to the reference."""
    responses = generate(policy, tokenizer, rows)
    batch = to_batch(responses, tokenizer)
    with torch.no_grad():
        batch.logprobs, batch.ref_logprobs = logprobs(policy, batch), logprobs(reference, batch)
    groups = {name: [response for response in responses if response.row.relation == name] for name in RELATIONS}
    shares = {name: fmean(map(Response.follows, group)) for name, group in groups.items()}
    return {"mean": fmean(shares.values()), **shares, "KL": mean_kl(batch)}


def report(policies: dict[str, Any], tokenizer: Any, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Print the evaluation of each policy, and one question under several meta-prompts."""
    table = {name: evaluate(policy, policies["after SFT"], tokenizer, rows) for name, policy in policies.items()}
    print(f"\n{len(rows)} held-out prompts: share of responses that follow the preference, and KL in nats per response")
    print(" " * 9, *(f"{column:>11}" for column in table["after SFT"]))
    for name, metrics in table.items():
        print(name, *(f"{value:11.2f}" for value in metrics.values()))
    print(f"\n{QUESTION!r}: the most frequent of 32 responses")
    for system_info, user_info in META_PROMPTS:
        print(f"  System Info {system_info!r}, User Info {user_info!r}")
        messages = [{"role": "user", "content": QUESTION}]
        row = replace(rows[0], system_info=system_info, user_info=user_info, messages=messages)
        for name, policy in policies.items():
            texts = Counter(response.row.response for response in generate(policy, tokenizer, [row], copies=32))
            print(f"    {name}  " + ",  ".join(f"{count:2} x {text!r}" for text, count in texts.most_common(2)))
    return table


def run(config: Config, folder: Path) -> dict[str, dict[str, float]]:
    """Run all stages and return the metrics of the table. `folder` holds the models between stages."""
    torch.manual_seed(config.seed)
    rows = prompts(config.seed, max(6_000, config.own_responses))
    sft, tokenizer = train_sft(config, demonstrations(config.seed, config.demonstrations, follow_rate=0.6), folder)
    own = generate(sft, tokenizer, rows[: config.own_responses])
    scorer = train_reward(config, pairs(config.seed, config.pairs, held_out=False), own, folder)
    # The critic starts from the reward model, which can recognize a good response. It gets a new head of one output.
    critic = AutoModelForTokenClassification.from_pretrained(
        folder / "reward", num_labels=1, ignore_mismatched_sizes=True
    )
    torch.nn.init.normal_(critic.score.weight, std=0.01)  # so values start near 0
    ppo = train_ppo(config, sft, critic, scorer, tokenizer, rows)
    return report({"after SFT": sft, "after PPO": ppo}, tokenizer, held_out_prompts(config.seed, config.held_out))


def main(words: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """The command line."""
    parser = HfArgumentParser(Config, description=__doc__, formatter_class=HelpFormatter)
    (config,) = parser.parse_args_into_dataclasses(words)
    if config.held_out < len(RELATIONS):
        parser.error(f"--held-out is {config.held_out}: it must be at least {len(RELATIONS)}, one row per relation")
    sys.modules.setdefault("deepspeed", None)  # if it is installed, transformers would import it
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        return run(config, Path(folder))


if __name__ == "__main__":
    main()
