"""Images to train and test on: the same ones in the same order, whatever reads them.

A source is digits or CIFAR's, held in memory (``pixels``), or a folder of image files (``folder``),
of which ``views`` says what the net sees.
"""

from fusedres.training.data.images import Data, DataError, Order, Testing, Training
from fusedres.training.data.reading import Loader
from fusedres.training.data.source import open_data

__all__ = ["Data", "DataError", "Loader", "Order", "Testing", "Training", "open_data"]
