"""`python -m tfdist.cli` runs the command `tfdist`."""

from tfdist.cli.commands import main

if __name__ == "__main__":
    main(prog_name="tfdist")
