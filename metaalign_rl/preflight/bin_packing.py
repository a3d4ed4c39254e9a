"""Whether what the actors ask of Ray can be placed on the nodes that there are."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, with what of it Ray deals out."""

    name: str
    cpus: float
    gpus: float
    memory_gib: float


@dataclass(frozen=True, slots=True)
class NamedBundle:
    """What must lie on one node together.

    Attributes:
        who: such as "rollout engine 1".
    """

    who: str
    cpus: float
    gpus: float

    def lacks(self, node: Node) -> str:
        """What the node has too little of; empty where the bundle fits."""
        short = [(self.gpus - node.gpus, "GPU"), (self.cpus - node.cpus, "CPU")]
        return " and ".join(counted(gap, kind) for gap, kind in short if gap > 1e-6)


def unplaced(bundles: Sequence[NamedBundle], nodes: Sequence[Node]) -> list[tuple[NamedBundle, str]]:
    """The bundles that find no node, each with what every node lacks for it once the others are placed.

    Largest first, each on the fullest node that still takes it: exact where the numbers of GPUs divide each other.
    """
    left = list(nodes)
    failed = []
    for bundle in sorted(bundles, key=lambda bundle: (-bundle.gpus, -bundle.cpus)):
        fitting = [index for index, node in enumerate(left) if not bundle.lacks(node)]
        if fitting:
            best = min(fitting, key=lambda index: (left[index].gpus, left[index].cpus))
            node = left[best]
            left[best] = Node(node.name, node.cpus - bundle.cpus, node.gpus - bundle.gpus, node.memory_gib)
        else:
            failed.append((bundle, "; ".join(f"{node.name} lacks {bundle.lacks(node)}" for node in left)))
    return failed


def counted(amount: float, kind: str) -> str:
    """Such as "1 GPU" or "0.12 CPUs"."""
    return f"{round(amount, 3):g} {kind}{'' if amount == 1 else 's'}"
