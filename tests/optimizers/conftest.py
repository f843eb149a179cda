"""One thread and one seed for every test of this folder."""

import pytest
import torch


@pytest.fixture(autouse=True)
def deterministic() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
