"""`python -m fastattr` is `fastattr`."""

from fastattr.cli import main

if __name__ == "__main__":
    main()
