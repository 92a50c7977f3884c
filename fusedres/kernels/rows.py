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
