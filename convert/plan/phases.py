"""The phases of a conversion: the memory, the disk and the work of each."""

from __future__ import annotations

from dataclasses import dataclass, fields

# Python with torch, transformers, PEFT and bitsandbytes, once models have been made.
LIBRARY_BYTES = 460 << 20
# Freed blocks of less than 32 MiB stay with the process: glibc's malloc gives only larger ones back to the system.
ALLOCATOR_BYTES = 128 << 20


@dataclass(frozen=True)
class Work:
    """What takes time. `converted`: weights that are written; `read_as_trained`: weights of the base that are read for
    the function as trained, which for a QLoRA quantizes them; `read_stored`: weights read in 16 bits, into float32.

    `products`: multiplications of two float32 numbers. `compared`: pairs of log-probabilities, each of a whole
    vocabulary at one position.
    """

    converted: float = 0
    read_as_trained: float = 0
    read_stored: float = 0
    products: float = 0
    compared: float = 0
    read_bytes: float = 0
    written_bytes: float = 0


@dataclass(frozen=True)
class Rates:
    """Seconds for one of each kind of `Work` on this machine."""

    converted: float
    read_as_trained: float
    read_stored: float
    products: float
    compared: float
    read_bytes: float
    written_bytes: float

    def seconds(self, work: Work) -> float:
        return float(sum(getattr(self, kind.name) * getattr(work, kind.name) for kind in fields(work)))


@dataclass(frozen=True)
class Phase:
    """A part of a conversion. `name`: the subject of a sentence.

    `memory_bytes`: of all processes, at the peak. `disk_bytes`: at the destination; `temporary_bytes`: in the directory
    of temporary files; both while the phase runs. `remedy`: what to do where they are short, as a sentence.
    """

    name: str
    memory_bytes: int
    work: Work = Work()
    disk_bytes: int = 0
    temporary_bytes: int = 0
    remedy: str = ""


@dataclass(frozen=True)
class Estimate:
    """The needs of a conversion. `seconds`: one for each phase; empty where the machine's speed was not measured."""

    output_bytes: int
    phases: tuple[Phase, ...]
    seconds: tuple[float, ...] = ()

    @property
    def memory_bytes(self) -> int:
        return max(phase.memory_bytes for phase in self.phases)

    @property
    def disk_bytes(self) -> int:
        return max(phase.disk_bytes for phase in self.phases)

    @property
    def temporary_bytes(self) -> int:
        return max(phase.temporary_bytes for phase in self.phases)
