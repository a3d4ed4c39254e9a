"""Measure how much the scores of a trained reward model change in bfloat16, and whether the ranking of pairs changes.

    python -m benchmarks.precision runs/quickstart/reward runs/quickstart/data/held_out_pairs.jsonl

Writes `benchmarks/results/precision.json`. Per label: the largest and the mean change of logits and probabilities, and
the share of probabilities that cross one half. Per mode: the share of pairs ranked correctly in each data type, and of
pairs ranked differently.
"""

import argparse
import sys
from dataclasses import replace
from typing import Any

from benchmarks.about import RESULTS, machine
from metaalign_rl.core.arguments import path
from metaalign_rl.core.dataflow import LABELS, Row
from metaalign_rl.core.files import write_json
from metaalign_rl.core.rows import read_rows


def main() -> int:
    """Score the pairs in both data types and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the reward model")
    parser.add_argument("pairs", type=path, help="JSONL of rows with chosen and rejected")
    parser.add_argument("--output", type=path, default=RESULTS / "precision.json", help="the JSON file to write")
    args = parser.parse_args()
    pairs = [row for row in read_rows(args.pairs) if row.chosen is not None]
    figures = compare(args.model, pairs)
    write_json(args.output, {"machine": machine(), "pairs": len(pairs), **figures})
    for label, moved in figures["labels"].items():
        print(f"{label:<8} logit changes by {moved['logit_max']:.3f} at most, {moved['logit_mean']:.3f} on average; "
              f"p by {moved['p_max']:.3f} and {moved['p_mean']:.4f}; {moved['crossing']:.2%} cross 0.5")  # fmt: skip
    for mode, ranks in figures["modes"].items():
        print(f"{mode:<8} accuracy {ranks['float32']:.4f} in float32, {ranks['bfloat16']:.4f} in bfloat16, "
              f"{ranks['changed']:.2%} ranked differently")  # fmt: skip
    return 0


def compare(model: str, pairs: list[Row]) -> dict[str, Any]:
    """Compare both data types by label and by mode."""
    import torch

    from reward import Scorer
    from reward.score import MODES, log_combine

    answers = [replace(row, response=text) for row in pairs for text in (row.chosen, row.rejected)]
    scores = {t: Scorer.from_pretrained(model, device="cpu", dtype=t).score(answers) for t in ("float32", "bfloat16")}
    exact, near = (torch.tensor([[s.logits[label] for label in LABELS] for s in one]) for one in scores.values())
    moved, moved_p = (exact - near).abs(), (exact.sigmoid() - near.sigmoid()).abs()
    crossing = ((exact > 0) != (near > 0)).float().mean(dim=0)
    labels = {
        label: {
            "logit_max": moved[:, index].max().item(),
            "logit_mean": moved[:, index].mean().item(),
            "p_max": moved_p[:, index].max().item(),
            "p_mean": moved_p[:, index].mean().item(),
            "crossing": crossing[index].item(),
        }
        for index, label in enumerate(LABELS)
    }
    modes = {}
    for mode in MODES:
        ranks = {}
        for dtype, found in scores.items():
            values = torch.tensor([log_combine(s, row, mode) for s, row in zip(found, answers, strict=True)])
            ranks[dtype] = values[0::2] > values[1::2]
        modes[mode] = {t: rank.float().mean().item() for t, rank in ranks.items()}
        modes[mode]["changed"] = (ranks["float32"] != ranks["bfloat16"]).float().mean().item()
    return {"labels": labels, "modes": modes}


if __name__ == "__main__":
    sys.exit(main())
