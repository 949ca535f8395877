"""The names of the devices that a user can choose. It loads no torch, and asks no machine what it has."""

from enum import StrEnum


class DeviceName(StrEnum):
    """auto: the GPU where there is one with enough memory free, else the CPU."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
