"""accelerate launch train.py recipe=NAME [key.sub=value ...]"""

import sys

from flora_train.__main__ import start

if __name__ == "__main__":
    start(["train", *sys.argv[1:]])
