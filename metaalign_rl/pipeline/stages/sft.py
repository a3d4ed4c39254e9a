"""The SFT stage: fine-tune the base model on demonstrations, with one rank of transformers' Trainer per device."""

import ray

from metaalign_rl.pipeline.context import RunContext
from metaalign_rl.runtime.actor_calls import follow
from metaalign_rl.runtime.progress import ProgressBar
from metaalign_rl.runtime.ray_session import actor_options
from metaalign_rl.runtime.rendezvous import rendezvous
from metaalign_rl.trainers.callbacks import as_trainer, saved_when_stopped
from metaalign_rl.trainers.sft import SFTWorker


def run(context: RunContext) -> None:
    """Train `sft/` from the base checkpoint. An interrupted training resumes from its last checkpoint."""
    config, folder = context.config, context.folder
    ranks, demonstrations = config.learner.world_size, folder.rows("demonstrations")
    actor, meeting = as_trainer(SFTWorker), rendezvous(config)
    workers = [
        actor.options(**actor_options(config, "training", ranks, rank)).remote(rank, ranks, meeting)
        for rank in range(ranks)
    ]
    if not folder.base.is_dir():
        ray.get(workers[0].prepare_base.remote(config.model, demonstrations, config.run.seed, folder.base))
    arguments = (config.sft, folder.base, demonstrations, folder.sft, folder.checkpoints / "sft")
    keywords = {"max_tokens": config.model.max_tokens, "seed": config.run.seed}
    streams = [worker.train.options(num_returns="streaming").remote(*arguments, **keywords) for worker in workers]
    with ProgressBar("sft") as bar, saved_when_stopped(workers, streams):
        for rank, update in follow(streams):
            if rank == 0:
                bar(update)
    for worker in workers:
        ray.kill(worker)
