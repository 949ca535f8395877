"""The quantization jobs over HTTP: their bodies, their rules, their routes."""
