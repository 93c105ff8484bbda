"""The old path of `qpert.runtime.inputs.box_files`; it goes with the next minor version."""

import warnings

from qpert.runtime.errors import QpertWarning
from qpert.runtime.inputs.box_files import *  # noqa: F403

warnings.warn("qpert.runtime.box_files is now qpert.runtime.inputs.box_files", QpertWarning, stacklevel=2)
