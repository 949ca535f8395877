"""What the formats that are written are called. Without torch, for whoever only checks what is asked for."""

from enum import StrEnum


class OutputFormat(StrEnum):
    """AWQ is the gemm layout: 4 bits and one group size in all modules. compressed-tensors holds every mixture."""

    AWQ = "awq"
    COMPRESSED_TENSORS = "compressed-tensors"
