"""Settings for the tests of layers."""

import torch

# The tensors are tiny: threads would only wait for each other, the more so with several test processes.
torch.set_num_threads(1)
