"""``python -m jobs.train``: the same as ``ray-qa train``, from a clone."""

import sys

from ray_qa.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
