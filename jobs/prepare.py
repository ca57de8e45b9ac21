"""``python -m jobs.prepare``: the same as ``ray-qa prepare``, from a clone."""

import sys

from ray_qa.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["prepare", *sys.argv[1:]]))
