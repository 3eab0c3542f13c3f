"""3D-Shampoo chosen in a file: LightningCLI makes the optimizer, and the model of `lightning_trainer.py`.

python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
"""

from lightning.pytorch.cli import LightningCLI
from lightning_trainer import Characters, windows

import shampoo3d  # noqa: F401  # it is found by its name in the file


class FromFile(Characters):
    configure_optimizers = None  # the file's


def main() -> None:
    LightningCLI(FromFile, trainer_defaults={}, save_config_callback=None)


if __name__ == "__main__":
    main()
