"""The blocks of Python that people copy run as they stand."""

import re

import pytest
import torch

from conftest import HERE


def test_your_own_tensors():
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    found = {}
    exec(blocks[0], found)
    x = found["net"](torch.randn(2000, 8))
    assert x.mean().item() == pytest.approx(3, abs=0.2)
    assert x.std(0).mean().item() == pytest.approx(1, abs=0.25)
    exec(blocks[1], found)
    one_hot = torch.eye(3).unsqueeze(1).expand(3, 2000, 3)
    x = found["net"](torch.cat([torch.randn(3, 2000, 8), one_hot], dim=-1))
    torch.testing.assert_close(x.mean((1, 2)), torch.tensor([-4.0, 0, 4]), atol=0.3, rtol=0)
    assert x.std(1).mean().item() == pytest.approx(1, abs=0.25)
