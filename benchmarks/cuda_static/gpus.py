"""What an arch offers a kernel (CUDA C++ Programming Guide, Compute Capabilities), and what a card's memory is sold as (data sheets)."""

from dataclasses import dataclass

REGISTERS = 65536  # of an SM, every arch here
REGISTER_UNIT = 256  # a warp's registers are given out in units
QUARTERS = 4  # of an SM, each with its own registers; a block's warps are dealt to them in turn
SHARED_RESERVED = 1024  # bytes that the system takes of every block


@dataclass(frozen=True)
class Arch:
    """Limits of one SM."""

    warps: int
    blocks: int
    shared: int  # bytes


ARCHS = {
    "80": Arch(64, 32, 164 * 1024),
    "86": Arch(48, 16, 100 * 1024),
    "89": Arch(48, 24, 100 * 1024),
    "90": Arch(64, 32, 228 * 1024),
    "100": Arch(64, 32, 228 * 1024),
    "120": Arch(48, 24, 100 * 1024),
}


@dataclass(frozen=True)
class Card:
    """What is published of it."""

    arch: str
    multiprocessors: int
    gigabytes: int  # a second
    megahertz: int  # boost clock
    cache: int  # megabytes of the second-level cache


CARDS = {
    "A100 80GB SXM": Card("80", 108, 2039, 1410, 40),
    "H100 SXM": Card("90", 132, 3350, 1755, 50),
    "RTX 3090": Card("86", 82, 936, 1695, 6),
    "RTX 4090": Card("89", 128, 1008, 2520, 72),
}
LATENCY = 800e-9  # seconds from a load to its data under full load; an assumption: 300 to 600 are measured on idle memory


def occupancy(arch: str, threads: int, registers: int, shared: int) -> float:
    """Resident warps over the most that an SM holds, for a grid that is large enough."""
    limits = ARCHS[arch]
    warps = -(-threads // 32)
    a_warp = max(1, -(-32 * registers // REGISTER_UNIT)) * REGISTER_UNIT
    by_registers = QUARTERS * (REGISTERS // QUARTERS // a_warp) // (-(-warps // QUARTERS) * QUARTERS)
    by_shared = limits.shared // (shared + SHARED_RESERVED)
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared) * warps / limits.warps


def needed_in_flight(card: Card, share: float) -> float:
    """Bytes that an SM must have asked for and not yet got, at this share of the card's bandwidth: Little's law."""
    return share * card.gigabytes * 1e9 * LATENCY / card.multiprocessors
