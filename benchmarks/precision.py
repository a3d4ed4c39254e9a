"""How far a trained reward model's scores move in bfloat16, and whether that changes what it prefers.

    python -m benchmarks.precision runs/quickstart/reward runs/quickstart/data/held_out_pairs.jsonl

Writes `benchmarks/results/precision.json`: by label the largest and the mean move of logits and probabilities, and how
many probabilities cross one half; by mode the share of pairs right in either type, and of those ranked otherwise.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.run import RESULTS, machine
from metaalign_rl.core.dataflow import LABELS, Row
from metaalign_rl.core.files import write_json
from metaalign_rl.core.rows import read_rows


def main() -> int:
    """Score the pairs in both types, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="reward model's folder")
    parser.add_argument("pairs", type=Path, help="JSONL of rows with chosen and rejected")
    parser.add_argument("--output", type=Path, default=RESULTS / "precision.json")
    args = parser.parse_args()
    pairs = [row for row in read_rows(args.pairs) if row.chosen is not None]
    figures = compare(args.model, pairs)
    write_json(args.output, {"machine": machine(), "pairs": len(pairs), **figures})
    for label, moved in figures["labels"].items():
        print(f"{label:<8} logit {moved['logit_max']:.3f} at most, {moved['logit_mean']:.3f} in the mean; "
              f"p {moved['p_max']:.3f}, {moved['p_mean']:.4f}; crossing 0.5: {moved['crossing']:.2%}")  # fmt: skip
    for mode, ranks in figures["modes"].items():
        print(f"{mode:<8} right {ranks['float32']:.4f} in float32, {ranks['bfloat16']:.4f} in bfloat16, "
              f"ranked otherwise {ranks['changed']:.2%}")  # fmt: skip
    return 0


def compare(model: str, pairs: list[Row]) -> dict[str, Any]:
    """The figures, by label and by mode."""
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
