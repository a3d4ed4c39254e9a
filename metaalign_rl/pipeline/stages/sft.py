"""The SFT stage: fine-tune the base model on demonstrations, with one rank of transformers' Trainer per device."""

import ray

from metaalign_rl.pipeline.context import RunContext
from metaalign_rl.pipeline.fitting_rows import require_fitting_rows
from metaalign_rl.runtime.actor_calls import merge_streams
from metaalign_rl.runtime.actor_options import actor_options
from metaalign_rl.runtime.progress import ProgressBar
from metaalign_rl.runtime.rendezvous import rendezvous
from metaalign_rl.trainers.callbacks import save_on_interrupt, trainer_actor
from metaalign_rl.trainers.sft import SFTWorker


def run(context: RunContext) -> None:
    """Train `sft/` from the base checkpoint. An interrupted training resumes from its last checkpoint."""
    config, folder = context.config, context.folder
    ranks, demonstrations = config.learner.world_size, folder.rows("demonstrations")
    actor, meeting = trainer_actor(SFTWorker), rendezvous(config)
    workers = [
        actor.options(**actor_options(config, "training", ranks, rank)).remote(rank, ranks, meeting)
        for rank in range(ranks)
    ]
    if not folder.base.is_dir():
        ray.get(workers[0].prepare_base.remote(config.model, demonstrations, config.run.seed, folder.base))
    require_fitting_rows(config, folder, folder.base)
    arguments = (config.sft, folder.base, demonstrations, folder.sft, folder.checkpoints / "sft")
    keywords = {"max_tokens": config.model.max_tokens, "seed": config.run.seed}
    streams = [worker.train.options(num_returns="streaming").remote(*arguments, **keywords) for worker in workers]
    with ProgressBar("sft") as bar, save_on_interrupt(workers, streams):
        for rank, update in merge_streams(streams):
            if rank == 0:
                bar(update)
    for worker in workers:
        ray.kill(worker)
