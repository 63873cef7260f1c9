"""`python -m quantization_mlx` is the command `quantization-mlx`."""

import sys

from .cli import main

sys.exit(main())
