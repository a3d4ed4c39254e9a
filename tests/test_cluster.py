"""A submitted run on a cluster of two nodes: stopped, submitted again, robbed of a node, then of the whole cluster."""

from pathlib import Path

import pytest
from conftest import TINY
from local_cluster import LocalCluster, wait_until

from metaalign_rl.core.files import read_log

pytestmark = pytest.mark.slow

STEPS = 12


def test_a_run_outlives_a_stop_the_loss_of_a_node_and_the_loss_of_its_cluster(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "submitted"
    entrypoint = pipeline(run, tiny_run)
    with LocalCluster(tmp_path, nodes=2) as cluster:
        cluster.submit("first", *entrypoint)
        until_step(run, 2, cluster, "first")
        assert all({"Learner", "RolloutEngine"} <= node.titles() for node in cluster.nodes)
        cluster.run("ray", "job", "stop", "first")
        wait_until(lambda: cluster.status("first") == "STOPPED", lambda: cluster.logs("first"))
        stopped = last_step(run)
        assert f"ppo: stopped; what is saved is step {stopped}\n" in cluster.logs("first")
        assert (run / "checkpoints" / "ppo" / f"step-{stopped}").is_dir(), "a stop loses no step that was finished"

        cluster.submit("second", *entrypoint)
        until_step(run, stopped + 1, cluster, "second")
        cluster.nodes[1].kill()
        cluster.nodes[1] = cluster.add_node()  # as KubeRay does
        until_step(run, stopped + 3, cluster, "second")
        assert "learner rank" in cluster.logs("second")
        assert cluster.status("second") == "RUNNING"

    with LocalCluster(tmp_path, nodes=2) as cluster:
        cluster.submit("third", "python", "jobs/ppo.py", *entrypoint[2:])  # the stage alone, of the same run
        wait_until(lambda: cluster.status("third") not in ("PENDING", "RUNNING"), lambda: cluster.logs("third"))
        assert cluster.status("third") == "SUCCEEDED", cluster.logs("third")
    steps = list(read_log(run / "metrics.jsonl"))
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert steps[0]["mismatch"] < 1e-4
    assert {step["staleness"] for step in steps} == {0.0, 1.0}, "a step behind, but after each start"
    assert (run / "policy" / "model.safetensors").is_file()


def pipeline(run: Path, tiny_run: Path) -> list[str]:
    """The entry point: two of each actor, ZeRO-3, one step stale; SFT and the reward model are there already."""
    tiny = [word for word in TINY if not word.startswith(("ppo.deterministic", "ppo.steps", "ppo.save_steps"))]
    words = [
        *("run.stages=[data,ppo]", f"model.path={tiny_run / 'sft'}", f"reward.path={tiny_run / 'reward'}"),
        *(
            "learner.world_size=2",
            "rollout.engines=2",
            "ppo.reward_workers=2",
            "cluster.cpus=4",
            "cluster.memory_gib=1",
        ),
        *("learner.zero_stage=3", "ppo.staleness=1", "learner.correction=token"),
        *(f"ppo.steps={STEPS}", "ppo.save_steps=100"),
    ]
    name = [f"run.name={run.name}", f"run.root={run.parent}"]
    return ["python", "jobs/pipeline.py", "--config", "configs/quickstart.yaml", *tiny, *words, *name]


def last_step(run: Path) -> int:
    return max((int(line["step"]) for line in read_log(run / "metrics.jsonl")), default=0)


def until_step(run: Path, step: int, cluster: LocalCluster, job: str) -> None:
    def is_there() -> bool:
        assert cluster.status(job) in ("PENDING", "RUNNING"), cluster.logs(job)
        return last_step(run) >= step

    wait_until(is_there, lambda: cluster.logs(job))
