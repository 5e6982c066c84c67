"""``python -m metalearn COMMAND`` is the same as ``metalearn COMMAND``."""

from metalearn.commands.main import main

if __name__ == "__main__":
    main()
