"""Bin packing: whether the bundles of a run fit the nodes of a cluster."""

from collections.abc import Sequence
from dataclasses import dataclass

from metaalign_rl.core.units import counted


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, with the resources that Ray can give to actors."""

    name: str
    cpus: float
    gpus: float
    memory_gib: float


@dataclass(frozen=True, slots=True)
class NamedBundle:
    """Resources that must be on one node.

    Attributes:
        who: the actors that need them, such as "rollout engine 1".
    """

    who: str
    cpus: float
    gpus: float

    def lacks(self, node: Node) -> str:
        """The resources that the node has too few of, such as "2 GPUs"; empty if the bundle fits."""
        gaps = [(self.gpus - node.gpus, "GPU"), (self.cpus - node.cpus, "CPU")]
        return " and ".join(counted(gap, kind) for gap, kind in gaps if gap > 1e-6)


def unplaced(bundles: Sequence[NamedBundle], nodes: Sequence[Node]) -> list[tuple[NamedBundle, str]]:
    """The bundles that fit no node, each with what every node lacks for it after the others are placed.

    Places the largest bundle first, each on the fullest node that still has room (best fit decreasing). The result is
    exact if the bundles' numbers of GPUs divide each other.
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
