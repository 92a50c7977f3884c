"""Images to train and test on: the same ones in the same order, whatever reads them.

A source is digits or CIFAR's, held in memory (``pixels``), or a folder of image files (``folder``).
"""

from fusedres.training.data.images import Data, DataError, Order, Testing, Training
from fusedres.training.data.source import open_data

__all__ = ["Data", "DataError", "Order", "Testing", "Training", "open_data"]
