"""PPO's rollouts with their rewards, saved for reading: one Parquet file per step, one row per response."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from metaalign_rl.core.dataflow import LABELS, TIERS, Batch, Rollout
from metaalign_rl.core.files import write_with

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        *((name, pa.string()) for name in ("row", "tier", "relation", "family", "kind", "split")),
        *((name, pa.string()) for name in ("system_info", "user_info")),
        ("messages", pa.string()),  # the dialog as JSON
        ("answer", pa.string()),
        ("tokens", pa.int32()),
        ("finished", pa.bool_()),  # false if truncated
        ("reward", pa.float32()),
        ("proxy", pa.float32()),
        ("gold", pa.bool_()),
        *((f"p_{label}", pa.float32()) for label in LABELS),  # the reward model's probabilities
        *((f"passes_{tier}", pa.bool_()) for tier in TIERS),  # the checks' results; null for a tier without a check
    ]
)


class RolloutWriter:
    """Writes the rollouts of every `every`-th step to `folder`, as `step-000010.parquet`. With 0 it writes none."""

    def __init__(self, folder: Path, every: int) -> None:
        self._folder, self._every = folder, every

    def write(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Write a step's rollouts, atomically. A repeated step replaces its file."""
        if self._every and step % self._every == 0:
            _write_table(self._folder / f"step-{step:06}.parquet", step, rollouts)


def save_experience(folder: Path, step: int, rollouts: Sequence[Rollout], batch: Batch) -> None:
    """Save a step's rollouts (`rollouts.parquet`) and its batch's tensors (`batch.safetensors`) for inspection."""
    from safetensors.torch import save

    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    present = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    write_with(folder / "batch.safetensors", lambda file: file.write(save(present)))
    _write_table(folder / "rollouts.parquet", step, rollouts)


def _write_table(path: Path, step: int, rollouts: Sequence[Rollout]) -> None:
    table = pa.Table.from_pylist([_record(step, rollout) for rollout in rollouts], schema=SCHEMA)
    write_with(path, lambda file: pq.write_table(table, file, compression="zstd"))


def read_rollouts(folder: Path) -> pa.Table:
    """All saved rollouts, by step. An empty table if there are none."""
    files = sorted(folder.glob("step-*.parquet"))
    return pa.concat_tables([pq.read_table(file, schema=SCHEMA) for file in files] or [SCHEMA.empty_table()])


def count_rollouts(folder: Path) -> tuple[int, int]:
    """The number of saved rollouts, and their uncompressed size in bytes."""
    found = [pq.read_metadata(file) for file in folder.glob("step-*.parquet")]
    size = sum(file.row_group(group).total_byte_size for file in found for group in range(file.num_row_groups))
    return sum(file.num_rows for file in found), size


def read_rollouts_at(folder: Path, indices: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the saved rollouts with these indices, with their index, in order. Holds one step in memory at a time."""
    first = 0
    for file in sorted(folder.glob("step-*.parquet")):
        table = pq.read_table(file, schema=SCHEMA)
        chosen = [index for index in range(first, first + table.num_rows) if index in indices]
        yield from zip(chosen, table.take([index - first for index in chosen]).to_pylist(), strict=True)
        first += table.num_rows


def _record(step: int, rollout: Rollout) -> dict[str, Any]:
    row, sample, reward = rollout.row, rollout.sample, rollout.reward
    record = {
        "step": step,
        "row": row.id,
        "tier": row.tier,
        "relation": row.relation,
        "family": row.family,
        "kind": row.tags.get("kind"),
        "split": row.tags.get("split"),
        "system_info": row.system_info,
        "user_info": row.user_info,
        "messages": json.dumps(row.messages, ensure_ascii=False),
        "answer": sample.text,
        "tokens": len(sample.response_ids),
        "finished": sample.finished,
        "reward": reward.value,
        "proxy": reward.proxy,
        "gold": reward.gold,
    }
    record |= {f"p_{label}": p for label, p in reward.probabilities.items()}
    return record | {f"passes_{tier}": passes for tier, passes in reward.passes.items()}
