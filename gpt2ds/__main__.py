"""`python -m gpt2ds` is `gpt2ds`."""

from gpt2ds.cli import main

main()
