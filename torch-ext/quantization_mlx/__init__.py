from .ops import *  # noqa: F403
from .ops import __all__ as __all__
