"""The rates and the memory of a device, from `rates.json`: measured for CPUs, from data sheets for GPUs."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from metaalign_rl.core.errors import UserError, nearest
from metaalign_rl.core.files import read_json

RATES = Path(__file__).with_name("rates.json")
CPU = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU, or all CPUs of a run, which count as one device that the roles use in turns.

    All rates are reached rates, not peak rates. Bandwidths are in bytes per second.

    Attributes:
        measured: the rates were measured with this project; else they are data-sheet numbers times an efficiency.
        source: where the rates come from.
        memory_gib: memory of a GPU; None for CPUs, which use the machine's memory.
        train, forward, decode: FLOP/s by dtype, of forward and backward passes, of forward passes only, and of
            decoding.
        bandwidth: bandwidth of the device's memory.
        link, network: bandwidth to another device of the same node, and of another node.
        transfer: bandwidth of weight sync from learners to engines.
        passes: how often a forward pass moves a layer's saved activations through memory, in addition to its matrix
            products; 0 if the FLOP/s are of complete models and include that.
        slack: resident memory divided by the bytes of activations in use; on a CPU the heap keeps much freed memory.
        offload: bandwidth of one rank to optimizer states in main memory.
        seconds: fixed costs in seconds: of a "layer" per pass, of an "engine_step" and of an "engine_layer" in it
            (none if the step is one CUDA graph), of a sampled "answer_token", of a scored "row", of a "call" of all
            learners, and of an "update", which is one optimizer step.
        process_gib: memory of a process by role, without models and activations.
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
        """Whether it is the CPUs of a machine, which all roles share."""
        return self.memory_gib is None


def names() -> list[str]:
    """The devices that `find_device` knows."""
    return [CPU, *read_json(RATES)["gpus"]["kinds"]]


def find_device(name: str, cpus: int = 1) -> Device:
    """The device with a name.

    Args:
        cpus: number of CPUs, for "cpu"; N CPUs count as N times as fast as one.

    Raises:
        UserError: the name is unknown.
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
