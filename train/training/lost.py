"""Training images that can no longer be read, whose places others have taken: see `TrainSet.get_image_and_label`."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from train.data.loaders import Positions


class LostImages:
    """What the ranks know of them: told by their workers with the batches, and to all workers with what is next.

    Args:
        accelerator: of the run.
        positions: hand out what is next.
        known: since before the run was gone on with: places in the data set.
    """

    def __init__(self, accelerator: Accelerator, positions: Positions, known: list[int]):
        self.accelerator, self.positions = accelerator, positions
        self.own: set[int] = set()
        self.known = positions.lost = tuple(known)

    def note(self, batch: dict[str, Any]) -> None:
        """What this rank's workers tell with a batch."""
        for lost in batch["lost"]:
            self.own.update(lost)

    def share(self) -> list[int]:
        """Tell all ranks, and the workers from their next batch on; those that are new (collective)."""
        every = set(self.known).union(*gather_object([sorted(self.own)]))
        new = sorted(every.difference(self.known))
        self.known = self.positions.lost = tuple(sorted(every))
        return new
