"""What the chips of pods have: memory, and the most arithmetic they can do."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, by its maker's figures.

    Attributes:
        name: as in targets, such as `v5p`.
        kind: how JAX calls it (`jax.Device.device_kind`).
        memory: bytes of device memory.
        flops: dense bfloat16 FLOPs a second.
    """

    name: str
    kind: str
    memory: int
    flops: float

    @property
    def platform(self) -> str:
        """`tpu` or `gpu`."""
        return "tpu" if self.kind.startswith("TPU") else "gpu"


CHIPS = (
    Chip("v4", "TPU v4", 32 * 2**30, 275e12),
    Chip("v5e", "TPU v5 lite", 16 * 2**30, 197e12),
    Chip("v5p", "TPU v5", 95 * 2**30, 459e12),
    Chip("v6e", "TPU v6 lite", 32 * 2**30, 918e12),
    Chip("h200", "NVIDIA H200", 141 * 10**9, 989e12),
)


def peak_flops(devices) -> float | None:
    """The most bfloat16 FLOPs a second of devices together; None where one of them is not in `CHIPS`."""
    known = {chip.kind: chip.flops for chip in CHIPS}
    rates = [known.get(device.device_kind) for device in devices]
    return None if None in rates else sum(rates)
