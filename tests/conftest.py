"""One thread for every test: the models are small, and threads that wait for each other cost half the time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
