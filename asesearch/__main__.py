"""`python -m asesearch`, and `accelerate launch -m asesearch`."""

from asesearch.cli import main

main()
