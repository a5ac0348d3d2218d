"""One thread per process: the tests' networks are tiny, and threads that wait for each other slow them down."""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch on import, and by the processes that tests start

import torch  # noqa: E402

torch.set_num_threads(1)
