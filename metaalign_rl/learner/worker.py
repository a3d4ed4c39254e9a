"""The learner: one rank that trains policy and critic. A plain class; Ray makes actors of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.core.batching import ENOUGH
from metaalign_rl.core.dataflow import Batch
from metaalign_rl.core.files import replace_folder
from metaalign_rl.learner import checkpoint
from metaalign_rl.learner.attention import require_shareable
from metaalign_rl.learner.batch import group_by_prompt
from metaalign_rl.learner.micro_batches import Inputs, MicroBatch, model_inputs, plan_batch
from metaalign_rl.runtime import deepspeed_setup
from metaalign_rl.runtime.gpu_memory import frees_gpu_memory

if TYPE_CHECKING:
    from metaalign_rl.weights.sender import SyncResult
    from metaalign_rl.weights.sync_plan import SyncPlan


class Learner:
    """One rank, on one device, in its own process.

    Call every method on all ranks with the same arguments: ranks meet in collective operations. Every rank gets the
    complete batch and computes its own share of it. An update is the same, up to rounding, for any number of ranks and
    micro-batches.
    """

    def __init__(
        self,
        config: LearnerConfig,
        rank: int,
        world_size: int,
        rendezvous: str,
        *,
        dtype: str,
        seed: int,
        temperature: float = 1.0,
        critic_warmup: int = 0,
        policy_steps: int | None = None,
    ) -> None:
        """Join the process group; see `deepspeed_setup.prepare`.

        Args:
            rendezvous: see `deepspeed_setup.prepare`.
            dtype: type of the weights, "float32" or "bfloat16". With bfloat16, DeepSpeed keeps float32 master weights.
            seed: seed of the minibatches' order, of a new value head and of new adapters.
            temperature: the responses are sampled at it.
            critic_warmup: number of updates at the start that leave the policy as it is.
            policy_steps: optimizer steps of the policy, for its schedule; None: `config.total_steps`.

        Raises:
            UserError: these settings cannot train this dtype.
        """
        config.check_dtype(dtype)
        self.config, self.rank, self.world_size = config, rank, world_size
        self.device = deepspeed_setup.prepare(rank, world_size, rendezvous)
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype, self._seed, self._temperature = getattr(torch, dtype), seed, temperature
        self._critic_warmup, self._policy_steps = critic_warmup, policy_steps or config.total_steps
        self.version = 0

    def setup(self, policy_path: str | Path, critic_path: str | Path | None, reference_path: str | Path) -> None:
        """Load the models from folders in the Hugging Face format.

        Args:
            critic_path: a critic, or a language or reward model whose backbone a new critic starts from; None for
                algorithms without a critic.

        Raises:
            UserError: a folder does not exist or is not safe to load, or its model cannot share prompts.
        """
        # DeepSpeed must not be imported before `deepspeed_setup.prepare`.
        from metaalign_rl.learner import deepspeed_engine, models, optimizer_step
        from metaalign_rl.learner.lora import Lora

        config, dtype = self.config, self._dtype
        self._policy_path = Path(policy_path)
        if config.share_prompts:
            for path in (policy_path, critic_path, reference_path):
                if path is not None:
                    require_shareable(Path(path))
        load_policy = partial(models.load_policy, dtype=dtype, temperature=self._temperature)
        lora = Lora(config.lora_rank, config.lora_alpha, self._seed) if config.lora_rank else None
        load, steps = partial(load_policy, self._policy_path, lora=lora), self._policy_steps
        self.policy = deepspeed_engine.build(load, replace(config, total_steps=steps), config.learning_rate, dtype)
        self.reference: Callable[[Inputs], tuple[Tensor, Tensor | None]]
        if lora is not None:
            assert Path(reference_path) == self._policy_path, "with adapters, the policy without them is the reference"
            self.reference = models.Unadapted(self.policy)
        else:
            load = partial(load_policy, Path(reference_path))
            self.reference = deepspeed_engine.build_frozen(load, config, self.device, dtype)
        self.critic = None
        if critic_path is not None:
            load_critic = partial(models.load_critic, Path(critic_path), dtype=dtype, seed=self._seed)
            self.critic = deepspeed_engine.build(load_critic, config, config.critic_learning_rate, dtype)
        self._update = optimizer_step.OptimizerStep(config, self.policy, self.critic, self.world_size, self.device)
        with self._states_on_device():
            pass  # they leave the device
        gc.freeze()  # these objects stay, so the garbage collector does not have to scan them

    @frees_gpu_memory
    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Batch | None:
        """On rank 0, the batch with `logprobs`, `ref_logprobs` and, with a critic, `values`; on other ranks None.

        With `old_logprobs="engine"`, `logprobs` are the engine's, except before an update that leaves the policy as it
        is, which computes none that could be compared with the engine's.
        """
        passes: dict[str, Callable[[Inputs], Tensor]] = {"ref_logprobs": lambda inputs: self.reference(inputs)[0]}
        if self.config.old_logprobs == "learner" or self.version < self._critic_warmup:
            passes["logprobs"] = lambda inputs: self.policy(inputs)[0]
        if self.critic is not None:
            passes["values"] = self.critic
        results = torch.zeros(len(passes), *batch.action_mask.shape, device=self.device)
        for micro in self._plan(batch, list(range(len(batch)))):
            part = batch.select(micro.indices)
            inputs = model_inputs(part, share_prompts=self.config.share_prompts).to(self.device)
            columns = [judge(inputs) for judge in passes.values()]
            if not micro.filler:
                spread = torch.zeros(len(passes), *part.action_mask.shape, device=self.device)
                spread[:, part.action_mask.to(self.device)] = torch.stack(columns)
                results[:, micro.indices, : spread.shape[2]] = spread
        results = self._over_ranks(results)
        if self.rank != 0:
            return None
        found = dict(zip(passes, results.cpu(), strict=True))
        return replace(batch, **({"logprobs": batch.rollout_logprobs} | found))

    @frees_gpu_memory
    def train(self, batch: Batch, kl_coef: float = 0.0, kl_estimator: str = "k3") -> dict[str, float]:
        """Update policy and critic on an evaluated batch with `advantages` and (with a critic) `returns`.

        Args:
            kl_coef: coefficient of the KL to the reference in the loss; 0 if the KL is in the rewards.
            kl_estimator: estimator of that KL; see `metaalign_rl.ppo.advantages.token_kl`.

        Returns:
            Metrics, the same on every rank; docs/metrics.md explains them.

            - Means over minibatches of means over response tokens: policy_loss; value_loss; clip_ratio (share of
              tokens where clipping is active); approx_kl (KL of the old policy to the new, nats); entropy (nats);
              kl_loss (with `kl_coef`). With off-policy correction also rollout_kl (KL of the rollout policy to the old
              one, nats) and corrected (share outside the bounds).
            - Means over minibatches: grad_norm and critic_grad_norm, before clipping.
            - lr and critic_lr of the next step; explained_variance of the returns by the old values.

        Raises:
            Diverged: on all ranks, before an optimizer step that would damage the weights.
        """
        from metaalign_rl.learner.divergence import check_batch
        from metaalign_rl.learner.losses import Penalty
        from metaalign_rl.learner.optimizer_step import explained_variance

        here, penalty = f"update {self.version + 1}", Penalty(kl_coef, kl_estimator)
        if not len(batch):  # every response was left out of the loss
            self.version += 1
            return self._rates()
        check_batch(batch, here)
        count = -(-len(batch) // self.config.minibatch_size)
        metrics: list[dict[str, float]] = []
        critic_only = self.version < self._critic_warmup
        with self._states_on_device():
            for epoch in range(self.config.epochs):
                for number, rows in enumerate(self._shuffled(batch).tensor_split(count), start=1):
                    where = f"{here}, epoch {epoch + 1}, minibatch {number} of {count}"
                    tokens = int(batch.action_mask[rows].sum())
                    plan = self._plan(batch, rows.tolist())
                    self._update.logprobs = None if metrics or critic_only else self._new_logprobs(batch)
                    metrics.append(self._update(batch, plan, tokens, len(rows), penalty, where, critic_only))
                    if (logprobs := self._update.logprobs) is not None:
                        self._first = rows.tolist(), self._over_ranks(logprobs)
        self.version += 1
        means = {name: sum(step[name] for step in metrics) / len(metrics) for name in metrics[0]}
        if self.critic is not None:
            means["explained_variance"] = explained_variance(batch)
        return means | self._rates()

    def first_logprobs(self) -> tuple[list[int], Tensor]:
        """With `old_logprobs="engine"`: the log-probabilities of the policy before the last update.

        Returns:
            The rows of the update's first minibatch, and [B, T-1] log-probabilities, 0 in other rows.
        """
        rows, logprobs = self._first
        return rows, logprobs.cpu()

    def connect_weights(self, plan: SyncPlan) -> None:
        """Connect to the engines of a sync plan; it replaces the last plan."""
        from metaalign_rl.learner.deepspeed_engine import stream_weights
        from metaalign_rl.weights.sender import Sender

        self._sender = Sender(plan, self.rank, partial(stream_weights, self.policy.module.model, plan.bucket_bytes))

    @frees_gpu_memory
    def send_weights(self, version: int) -> SyncResult:
        """Send the policy's weights to the plan's engines as `version`; rank 0's result holds their confirmations."""
        return self._sender.send(version)

    def save_policy(self, path: str | Path) -> None:
        """Write the policy as a Hugging Face checkpoint with its tokenizer, replacing the folder's contents.

        Raises:
            Diverged: on all ranks, if its weights are not finite. Nothing is written.
        """
        from metaalign_rl.learner import deepspeed_engine, models

        self._require_finite({"policy": self.policy})
        model = self.policy.module.model
        weights = deepspeed_engine.full_weights(model, keep=self.rank == 0)

        def fill(folder: Path) -> None:
            # The names are already those of a checkpoint.
            model.save_pretrained(folder, state_dict=weights, save_original_format=False)
            models.copy_tokenizer(self._policy_path, folder)

        if self.rank == 0:
            replace_folder(Path(path), fill)
        dist.barrier()

    def save_state(self, path: str | Path) -> None:
        """Write the complete training state: weights, optimizers, schedules, random generators, running means.

        Raises:
            Diverged: on all ranks, if weights or optimizer states are not finite. Nothing is written.
        """
        self._require_finite(self._engines())
        own = {"version": self.version, "means": self._update.monitor.means}
        with self._states_on_device():
            checkpoint.save(Path(path), self._engines(), self._generator, own)

    def load_state(self, path: str | Path) -> None:
        """Load what `save_state` wrote. Load only your own runs' states: DeepSpeed's format can run code.

        Raises:
            UserError: there is no such folder, or it was written by another number of ranks.
        """
        with self._states_on_device():
            own = checkpoint.load(Path(path), self._engines(), self._generator)
        self.version, self._update.monitor.means = own["version"], own["means"]

    def _new_logprobs(self, batch: Batch) -> Tensor | None:
        """Where an update notes its log-probabilities, if nothing else computes them; see `first_logprobs`."""
        needed = self.config.old_logprobs == "engine"
        return torch.zeros(batch.action_mask.shape, device=self.device) if needed else None

    def _over_ranks(self, values: Tensor) -> Tensor:
        """The values of all ranks: each sample is filled in by one rank, and 0 on the others."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    @contextmanager
    def _states_on_device(self) -> Iterator[None]:
        """Inside, the optimizer states are on the device. With `offload_states`, afterwards they are in main memory."""
        from metaalign_rl.learner.deepspeed_engine import offload_states

        engines = self._engines().values() if self.config.offload_states else ()
        for engine in engines:
            engine.reload_states()
        yield
        for engine in engines:
            offload_states(engine)

    def _require_finite(self, engines: dict[str, Any]) -> None:
        from metaalign_rl.learner.divergence import REMEDY, Diverged, is_finite

        broken = torch.tensor([float(not is_finite(engine)) for engine in engines.values()], device=self.device)
        if self.world_size > 1:
            dist.all_reduce(broken)
        for name, count in zip(engines, broken.tolist(), strict=True):
            if count:
                reason = f"the weights or optimizer states of the {name} are not finite, so nothing is saved"
                raise Diverged(f"update {self.version}: {reason}; {REMEDY}")

    def _engines(self) -> dict[str, Any]:
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})

    def _rates(self) -> dict[str, float]:
        """The learning rates of the next step."""
        engines = {"lr": self.policy} | ({} if self.critic is None else {"critic_lr": self.critic})
        return {name: engine.get_lr()[0] for name, engine in engines.items()}

    def _shuffled(self, batch: Batch) -> Tensor:
        """All rows in a new order. With `share_prompts`, rows with the same prompt stay together."""
        groups = group_by_prompt(batch) if self.config.share_prompts else [[row] for row in range(len(batch))]
        order = torch.randperm(len(groups), generator=self._generator).tolist()
        return torch.tensor([row for group in order for row in groups[group]])

    def _plan(self, batch: Batch, indices: list[int]) -> list[MicroBatch]:
        tokens, share = self.config.micro_batch_tokens, self.config.share_prompts
        # On a GPU, few full passes are faster, and with ZeRO-3 each pass gathers all weights. A CPU is busy with less.
        enough = ENOUGH if self.device.type == "cpu" else tokens
        return plan_batch(batch, indices, self.world_size, tokens, enough, share_prompts=share)[self.rank]
