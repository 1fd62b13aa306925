"""python -m flora_train"""

import sys

from flora_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
