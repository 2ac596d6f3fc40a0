"""Queries that are multiplied by a number that grows with their position."""

import torch

from dynquant.fused.places import part_of


class Stretching:
    """What an attention multiplies its queries by.

    Args:
        module: the block.
        names: a Stretch.
    """

    def __init__(self, module, names):
        self._module, self._names = module, names

    def read(self, call, positions):
        """The Call with it; None where the positions or the numbers are not what is expected."""
        factor, length = self._numbers()
        if (
            not isinstance(positions, torch.Tensor)
            or positions.dim() != 2
            or None in (factor, length)
        ):
            return None
        batch, rows, _ = call.x.shape
        if positions.shape[0] not in (1, batch) or positions.shape[1] != rows:
            return None
        stretch = 1 + factor * torch.log(1 + torch.floor(positions / length))
        return call._replace(stretch=stretch[:, :, None, None].to(call.x.dtype))

    def sample(self, rows):
        """The argument that has positions, for a call that is tried: some are beyond the length."""
        _, length = self._numbers()
        return {self._names.positions: torch.arange(rows)[None] * length // 2}

    def _numbers(self):
        settings = part_of(self._module, self._names.settings)
        return settings.get(self._names.factor), settings.get(self._names.length)
