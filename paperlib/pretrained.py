"""The recorded models, to draw from: no data set is needed, and nothing is trained.

rooms = paperlib.load_pretrained("sequential").sample(10)

python -m paperlib.sample sequential --out rooms.png
"""

from typing import Any

from paperlib.fuzziness.pretrained import Fuzziness
from paperlib.pixelvae.pretrained import Chain
from paperlib.sequential.pretrained import Sequential
from paperlib.system.errors import UserError

MODELS = {"fuzziness": Fuzziness, "sequential": Sequential, "pixelvae": Chain}


def load(name: str, device: str = "auto") -> Any:
    """See `paperlib.load_pretrained`."""
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: choose from {', '.join(MODELS)}")
    return MODELS[name](device)
