"""What the tensors that travel between the ops hold, beside activations."""

# stats [5, C]: mean, biased variance, 1 / sqrt(variance + eps), weight * rstd, bias - mean * scale
MEAN, VAR, RSTD, SCALE, SHIFT = range(5)
STATS_ROWS = 5
# sums [4, C]: sum(du), sum(du * (x - mean)) * rstd, and made of them what an input's gradient needs beside
# stats, with M values per channel: -scale / M * rstd * dweight, -scale / M * dbias
#     dx = scale * du + slope * (x - mean) + offset
DBIAS, DWEIGHT, SLOPE, OFFSET = range(4)
SUMS_ROWS = 4
# index of bn_relu_maxpool: 3 * row + column in the window, or this where the ReLU let nothing through
NOWHERE = 9
# pixels [N, rows, columns, 4]: the stem's image with a border of zeros, its channels and a zero; so a window
# of 7 rows by 8 pixels begins at row 2p and column 2q, and the first of the eight has no weight
STEM_CHANNELS, STEM_SIDE, STEM_BORDER = 3, 7, 3


def pixels_shape(n: int, height: int, width: int) -> tuple[int, int, int, int]:
    """The shape of ``pixels`` for images [N, 3, height, width]."""
    rows, columns = ((size - 1) // 2 + 1 for size in (height, width))
    return n, 2 * rows + STEM_SIDE - 2, 2 * columns + STEM_SIDE - 1, STEM_CHANNELS + 1
