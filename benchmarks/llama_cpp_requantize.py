"""Writes a GGUF file anew in Q4_0: python -m benchmarks.llama_cpp_requantize IN OUT, run by the peer's own Python.

llama.cpp has its fastest CPU kernels for that format: it rearranges the weights for the CPU's instructions as it loads.
"""

import sys

import llama_cpp


def main() -> int:
    source, target = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    # of what is already rounded: speed is measured here, not quality
    parameters.allow_requantize = True
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters))


if __name__ == "__main__":
    sys.exit(main())
