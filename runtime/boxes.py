"""The old path of `qpert.runtime.inputs.boxes`; it goes with the next minor version."""

import warnings

from qpert.runtime.errors import QpertWarning
from qpert.runtime.inputs.boxes import *  # noqa: F403

warnings.warn("qpert.runtime.boxes is now qpert.runtime.inputs.boxes", QpertWarning, stacklevel=2)
