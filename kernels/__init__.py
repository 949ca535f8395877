"""INT4 kernels: tensors in, tensors out. Light to import: no torch, no Triton, and no version attribute.

The import name is shared with a public distribution that `transformers` probes for, so this module stays empty.
"""
