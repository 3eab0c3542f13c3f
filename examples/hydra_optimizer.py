"""3D-Shampoo made by Hydra from `hydra_optimizer.yaml`; any setting may be given on the command line.

python examples/hydra_optimizer.py optimizer.lr=1e-2 optimizer.hyperparams.block_size=64
"""

import hydra
import torch
from omegaconf import DictConfig
from torch import nn


@hydra.main(version_base=None, config_path=".", config_name="hydra_optimizer")
def main(config: DictConfig) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    optimizer = hydra.utils.instantiate(config.optimizer, params=model.parameters())
    x = torch.randn(256, 64)
    for step in range(config.steps):
        loss = nn.functional.mse_loss(model(x), x[:, :8].tanh())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    print(optimizer.report())


if __name__ == "__main__":
    main()
