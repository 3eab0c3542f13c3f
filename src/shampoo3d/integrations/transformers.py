"""Checkpoints of Hugging Face's ``Trainer``, complete on any number of ranks, and numbers for its logs.

The trainer saves the optimizer on its first rank only, where 3D-Shampoo has a part of its state. The callback saves a
folder beside that on all ranks, and loads it when the trainer resumes, on another number of ranks, too.
"""

import shutil
from pathlib import Path
from typing import Any

try:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(f'{missing}: pip install "3d-shampoo[trainers]"', name=missing.name) from missing

from shampoo3d.integrations.scalars import shampoo_in

FOLDER = "shampoo"
"""Name of the folder within each of the trainer's checkpoints."""


class ShampooCallback(TrainerCallback):  # type: ignore[misc]
    """Saves and loads the optimizer's state beside the trainer's checkpoints; give it as one of its ``callbacks``.

    Under DeepSpeed and FSDP2 it saves and loads nothing, since there the trainer asks all ranks.

    Args:
        watch: steps between two of which ``report().scalars()`` are added to what the trainer logs, the same as its
            ``logging_steps``; 0 for none. The trainer lets its own reporters log before any callback that it was given:
            ``trainer.callback_handler.callbacks.insert(0, ShampooCallback(watch=...))`` comes before them.
    """

    def __init__(self, watch: int = 0) -> None:
        self.watch = watch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the folder of the checkpoint that the trainer resumes from.

        Raises:
            FileNotFoundError: naming the places, if the dictionary that was loaded has its state in a folder that is in
                none of them.
        """
        optimizer = shampoo_in(kwargs.get("optimizer"))
        if optimizer is not None and self.watch:
            optimizer.watch(self.watch)
        asks_all = PartialState().distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
        if optimizer is None or asks_all or (args.world_size == 1 and not optimizer.awaits_folder):
            return
        optimizer.elsewhere = FOLDER if args.world_size > 1 else ""
        if optimizer.awaits_folder:
            places = [_checkpoint(args, state)]
            if isinstance(args.resume_from_checkpoint, str) and Path(args.resume_from_checkpoint).is_dir():
                places.insert(0, Path(args.resume_from_checkpoint))
            found = [place / FOLDER for place in places if (place / FOLDER).is_dir()]
            if not found:
                raise FileNotFoundError(f"the state is in a folder {FOLDER!r}, which is in none of {places}")
            optimizer.load_checkpoint(found[0], weights=False)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the folder, on all ranks."""
        optimizer = shampoo_in(kwargs.get("optimizer"))
        if optimizer is not None and optimizer.elsewhere and not args.save_only_model:
            folder = _checkpoint(args, state) / FOLDER
            if state.is_world_process_zero and folder.exists():  # the run went on from an earlier step
                shutil.rmtree(folder)
            optimizer.save_checkpoint(folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers of the last recorded step to the logs and to their history, without waiting."""
        optimizer = shampoo_in(kwargs.get("optimizer"))
        if optimizer is not None and self.watch and logs is not None:
            numbers = optimizer.report().scalars()
            logs.update(numbers)
            state.log_history[-1].update(numbers)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
