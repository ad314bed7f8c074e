"""Positions of texts and images in one row: Qwen3-VL's interleaved multimodal rotary positions.

Shapes: N rows, L tokens, P images, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vembed_fs2.errors import DataError


def number_tokens(visual: Tensor, lengths: Sequence[int], grids: Tensor, rows: Tensor) -> Tensor:
    """Number the tokens of each row over time, height and width.

    Texts count on; the tokens of an image have the row and the column that they
    are in, and the text after it goes on behind the larger of both.

    :param visual: True for tokens of images. *Shape:* ``[N, L]``, on the CPU.
    :param lengths: the number of tokens of each row.
    :param grids: the tokens of each image over time, height and width. *Shape:* ``[P, 3]``.
    :param rows: the row of each image, ascending. *Shape:* ``[P]``, on the CPU.
    :returns: *Shape:* ``[3, N, L]``, int64; 0 for padding.
    :raises DataError: a row has other tokens than its images need.
    """
    numbers = torch.zeros(3, *visual.shape, dtype=torch.int64)

    images: dict[int, list[list[int]]] = {}
    for row, grid in zip(rows.tolist(), grids.tolist()):
        images.setdefault(row, []).append(grid)

    for row, length in enumerate(lengths):
        number = start = 0
        places = visual[row].nonzero().squeeze(1).tolist()
        taken = 0
        for grid in images.get(row, []):
            count = grid[0] * grid[1] * grid[2]
            own = places[taken : taken + count]
            if len(own) < count or own[-1] - own[0] != count - 1:
                raise DataError(f"Row {row} has not as many tokens together as its image needs ({count}).")

            first, taken = own[0], taken + count
            numbers[:, row, start:first] = torch.arange(number, number + first - start)
            number += first - start

            where = torch.cartesian_prod(*(torch.arange(size) for size in grid))
            numbers[:, row, first : first + count] = where.T + number
            number += max(grid)
            start = first + count

        if taken != len(places):
            raise DataError(f"Row {row} has {len(places)} tokens of images, but its images need {taken}.")
        numbers[:, row, start:length] = torch.arange(number, number + length - start)

    return numbers


def rotate_interleaved(numbers: Tensor, frequencies: Tensor, sections: Sequence[int]) -> Tensor:
    """Return the cosines and sines of each token.

    Pairs of dimensions take turns: time, height, width, time, ... until the
    sections of height and width are used up; time has the rest.

    :param numbers: *Shape:* ``[3, N, L]``.
    :param frequencies: *Shape:* ``[D / 2]``.
    :param sections: how many pairs belong to time, height and width.
    :returns: *Shape:* ``[2, N, L, 1, D / 2]``.
    """
    axis = torch.zeros(frequencies.numel(), dtype=torch.int64, device=frequencies.device)
    for dim in (1, 2):
        axis[dim : 3 * sections[dim] : 3] = dim

    # [N, L, D / 2]: the number that counts for each pair.
    angles = numbers.permute(1, 2, 0)[..., axis].float() * frequencies
    angles = angles.unsqueeze(2)
    return torch.stack((angles.cos(), angles.sin()))
