"""`python -m quant`: the quantizer's command line."""

from quant.cli import main

if __name__ == "__main__":
    main()
