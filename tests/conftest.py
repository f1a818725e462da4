"""One thread a worker: the systems are small, and `make test` already runs one worker a core."""

import torch

torch.set_num_threads(1)
