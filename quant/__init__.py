"""The offline quantizer: a model directory in, a checkpoint directory out. Run it as `python -m quant`."""
