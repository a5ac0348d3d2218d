"""One thread: the tests' networks are tiny, and threads that wait for each other slow them down."""
import torch

torch.set_num_threads(1)
