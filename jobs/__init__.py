"""Entry points for ``ray job submit --working-dir . -- python -m jobs.NAME ...``; the code is `ray_qa.cli`."""
