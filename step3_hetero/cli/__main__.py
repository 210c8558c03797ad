"""``python -m step3_hetero.cli``."""

from step3_hetero.cli import main

if __name__ == "__main__":
    main()
