"""`python -m defaker_opt` is `defaker-opt`."""

from defaker_opt.cli import main

if __name__ == "__main__":
    main()
