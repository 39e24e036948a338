"""`python -m tfdist` is `tfdist`, where the command is not on the path."""

from tfdist.cli import main

if __name__ == "__main__":
    main(prog_name="tfdist")
