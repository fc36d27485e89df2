"""``python -m mmfusion``."""

from mmfusion.cli import main

if __name__ == "__main__":
    main()
