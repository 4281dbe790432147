"""Machines: how fast they multiply, move and send, and how much they hold."""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Machine:
    """One processor of many, and its connections.

    Attributes:
        flops: operations a second that products reach, not the peak of a data sheet.
        bandwidth: bytes a second between memory and processor.
        memory: bytes.
        pass_seconds: of one forward and backward beside its arithmetic: starting its operations.
        link: bytes a second from one processor to the others of its node.
        network: bytes a second from one processor to those of other nodes.
        per_node: processors of a node.
        overhead: bytes of a process without a model.
    """

    flops: float
    bandwidth: float
    memory: float
    pass_seconds: float
    link: float
    network: float
    per_node: int = 8
    overhead: float = 2 * GB


EFFICIENCY = 0.4
"""Share of a data sheet's dense bf16 FLOPs that large products of a training reach, usually 0.3 to 0.5."""
LAUNCH_SECONDS = 0.03
"""Of a pass on a GPU: some thousands of operations at several microseconds each."""


def _gpu(teraflops: float, bandwidth: float, memory: float, link: float, network: float) -> Machine:
    return Machine(EFFICIENCY * teraflops * 1e12, bandwidth * GB, memory * GB, LAUNCH_SECONDS, link * GB, network * GB)


MACHINES: dict[str, Machine] = {
    # Data sheets: dense bf16 TFLOP/s, GB/s of memory, GB, GB/s of NVLink each way, GB/s of one network card per GPU.
    "a100": _gpu(312, 2039, 80, 300, 25),
    "h100": _gpu(989, 3350, 80, 450, 50),
    "h200": _gpu(989, 4800, 141, 450, 50),
    "b200": _gpu(2250, 8000, 180, 900, 50),
    "l4": _gpu(121, 300, 24, 32, 12),
    # One core with AVX-512, in fp32. The overhead: imported libraries, products that oneDNN keeps compiled, freed heap.
    "cpu": Machine(60e9, 10 * GB, 16 * GB, 0.2, 5 * GB, 1 * GB, per_node=1, overhead=0.93 * GB),
}
"""Name -> machine. No GPU of these has been measured by this project."""
