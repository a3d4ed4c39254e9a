"""How fast a device is and how much it holds, from `rates.json`: measured on a CPU, off data sheets for GPUs."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from metaalign_rl.core.errors import UserError, nearest
from metaalign_rl.core.files import read_json

RATES = Path(__file__).with_name("rates.json")
CPU = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU, or all the CPUs that a run uses: they work as one device, each role in its turn.

    Rates are those reached, not those promised.

    Attributes:
        measured: the rates were measured with this project; else they are a data sheet's times an efficiency.
        memory_gib: of a GPU; None: the machine's.
        train, forward, decode: FLOP/s by dtype: forward and backward passes, forward passes alone, and decoding.
        bandwidth: bytes a second from the device's memory.
        link, network: bytes a second to another device of the same node, and of another node.
        transfer: bytes a second of new weights from learners to engines.
        passes: times that a forward pass moves a layer's kept activations through memory, beside its products; 0
            where the FLOP/s are a whole model's and hold that already.
        slack: resident memory over the bytes of activations in use; on a CPU the heap keeps much of what is freed.
        offload: bytes a second from and to optimizer states that are kept in main memory, by one rank.
        seconds: fixed costs: of a "layer" in one pass, of an "engine_step" and an
            "engine_layer" in it (none where the step is one CUDA graph), of an "answer_token" sampled, of a "row"
            scored, of a "call" of all learners, and of an "update", a step of one optimizer.
        process_gib: what a process holds beside what it computes with, by role.
    """

    name: str
    title: str
    measured: bool
    source: str
    memory_gib: float | None
    train: dict[str, float]
    forward: dict[str, float]
    decode: dict[str, float]
    bandwidth: float
    link: float
    network: float
    transfer: float
    passes: float
    slack: float
    offload: float
    seconds: dict[str, float]
    process_gib: dict[str, float]

    @property
    def is_cpu(self) -> bool:
        """Whether all roles share it, and memory is the machine's."""
        return self.memory_gib is None


def names() -> list[str]:
    """The devices that `find_device` knows."""
    return [CPU, *read_json(RATES)["gpus"]["kinds"]]


def find_device(name: str, cpus: int = 1) -> Device:
    """The device of that name; `cpus` CPUs are as many times as fast as one.

    Raises:
        UserError: an unknown name.
    """
    rates, known = read_json(RATES), names()
    if name not in known:
        raise UserError(f"--gpu {name}: unknown device; {nearest(name, known)}")
    return _cpus(rates["cpu"], cpus) if name == CPU else _gpu(name, rates["gpus"])


def _cpus(rates: dict[str, Any], cpus: int) -> Device:
    bandwidth = rates["bandwidth"] * cpus * rates["efficiency"]["bandwidth"]
    flops = {dtype: rate * cpus for dtype, rate in rates["flops"].items()}
    return _device(CPU, rates | {"bandwidth": bandwidth, "memory_gib": None}, flops)


def _gpu(name: str, rates: dict[str, Any]) -> Device:
    sheet, efficiency = rates["kinds"][name], rates["efficiency"]
    network = rates["network"] * efficiency["link"]
    reached = {
        "title": sheet["title"],
        "memory_gib": sheet["memory_gib"],
        "bandwidth": sheet["bandwidth"] * efficiency["bandwidth"],
        "link": sheet["link"] * efficiency["link"],
        "network": network,
        "transfer": network,
        "passes": 0.0,
    }
    return _device(name, rates | reached, {dtype: sheet[dtype] for dtype in ("bfloat16", "float32")})


def _device(name: str, rates: dict[str, Any], flops: dict[str, float]) -> Device:
    values: dict[str, Any] = {field.name: rates[field.name] for field in fields(Device) if field.name in rates}
    for work in ("train", "forward", "decode"):
        values[work] = {dtype: rate * rates["efficiency"][work][dtype] for dtype, rate in flops.items()}
    return Device(name=name, **values)
