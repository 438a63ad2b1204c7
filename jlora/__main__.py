"""`python -m jlora`: the command line."""

from jlora.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
