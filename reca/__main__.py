"""`python -m reca` is the console script."""

from reca.cli import main

main()
