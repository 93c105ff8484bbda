"""`python -m qpert.runtime.cli`."""

from qpert.runtime.cli import main

main()
