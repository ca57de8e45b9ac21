"""``python -m jobs.test``: the same as ``ray-qa test``, from a clone."""

import sys

from ray_qa.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["test", *sys.argv[1:]]))
