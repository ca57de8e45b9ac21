"""``python -m jobs.eval``: the same as ``ray-qa eval``, from a clone."""

import sys

from ray_qa.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["eval", *sys.argv[1:]]))
