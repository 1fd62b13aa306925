"""accelerate launch train.py recipe=NAME [key.sub=value ...]"""

import sys

from flora_train.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
