"""3D-Shampoo chosen in a file: LightningCLI makes it, for the model of `lightning_trainer.py`.

python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
"""

from lightning.pytorch.cli import LightningCLI
from lightning_trainer import Characters, Text


def main() -> None:
    cli = LightningCLI(Characters, Text, save_config_callback=None)
    cli.trainer.print(cli.trainer.optimizers[0].report())


if __name__ == "__main__":
    main()
