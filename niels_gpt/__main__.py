"""`python -m niels_gpt` is `niels-gpt`."""

from niels_gpt.cli import main

if __name__ == "__main__":
    main(prog_name="niels-gpt")
