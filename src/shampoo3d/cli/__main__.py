"""The program behind ``python -m shampoo3d.cli``, the same as the command ``shampoo3d``."""

from shampoo3d.cli.commands import main

main()
