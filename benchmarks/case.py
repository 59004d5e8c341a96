"""One benchmark case: a call of one MoE layer with a given batch size, dtype, direction and transport."""

from dataclasses import asdict, dataclass
from typing import Literal

DType = Literal["float32", "bfloat16"]
Direction = Literal["forward", "forward+backward"]
Transport = Literal["shm", "inline"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured case. `transport` is None for contenders without a choice of transport."""

    tokens: int
    dtype: DType
    direction: Direction = "forward"
    transport: Transport | None = None

    def to_json(self) -> dict[str, str | int | None]:
        return asdict(self)

    def __str__(self) -> str:
        transport = f", {self.transport}" if self.transport else ""
        return f"{self.direction}, {self.dtype}, {self.tokens} tokens{transport}"
