"""The rows of the two small tensors that travel between the batch-norm ops."""

# stats [5, C]: mean, biased variance, 1 / sqrt(variance + eps), weight * rstd, bias - mean * scale
MEAN, VAR, RSTD, SCALE, SHIFT = range(5)
STATS_ROWS = 5
# sums [2, C]: sum(du), sum(du * (x - mean)) * rstd
DBIAS, DWEIGHT = range(2)
SUMS_ROWS = 2
