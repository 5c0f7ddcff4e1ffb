"""Entry point of the command line: ``python -m celestial_backend``."""

from celestial_backend.commands.cli import main

if __name__ == "__main__":
    main()
