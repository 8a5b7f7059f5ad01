"""Where kernel tests run: on the GPU if there is one, else in Triton's interpreter."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
