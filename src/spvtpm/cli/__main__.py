"""`python -m spvtpm.cli`."""

from spvtpm.cli import main

main()
