"""``python -m quantpatch``."""

from quantpatch.cli.main import main

if __name__ == "__main__":
    main()
