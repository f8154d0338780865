"""``python -m quantpatch``."""

from quantpatch.cli import main

if __name__ == "__main__":
    main()
